#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Runs memcnn_benchmark at several depths and writes one JSON object an engine
# and line, for figures.py.

set -eu

if [ $# -lt 2 ] || [ "$1" = --help ]; then
  echo "usage: $0 PROGRAM OUTPUT [option of memcnn_benchmark...]"
  echo "  PROGRAM  path of memcnn_benchmark"
  echo "  OUTPUT   file to write"
  echo "  DEPTHS   environment variable: the depths (default: 3 9 27 81)"
  [ "${1-}" = --help ] && exit 0
  exit 2
fi

program=$1
output=$2
shift 2
depths=${DEPTHS:-3 9 27 81}

if [ ! -x "$program" ]; then
  echo "$0: expected $program to be a program, but it is none." >&2
  exit 2
fi

# The output appears when it is complete.
trap 'rm -f "$output.partial"' EXIT
: > "$output.partial"
for depth in $depths; do
  echo "depth $depth" >&2
  "$program" "$@" --depth "$depth" --json >> "$output.partial" || {
    echo "$0: depth $depth failed; what it printed:" >&2
    tail -n 5 "$output.partial" >&2
    exit 1
  }
done
mv "$output.partial" "$output"
