#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Runs memcnn_benchmark or peers.py on several networks and writes one JSON object an
# engine and line, for figures.py.

set -eu

depths="--depth 3, --depth 9, --depth 27, --depth 81"
if [ $# -lt 2 ] || [ "$1" = --help ]; then
  echo "usage: $0 PROGRAM OUTPUT [option of PROGRAM...]"
  echo "  PROGRAM   path of memcnn_benchmark or peers.py"
  echo "  OUTPUT    file to write"
  echo "  NETWORKS  environment variable: the options of each network,"
  echo "            comma-separated (default: $depths)"
  [ "${1-}" = --help ] && exit 0
  exit 2
fi

program=$1
output=$2
shift 2

if [ ! -x "$program" ]; then
  echo "$0: expected $program to be a program, but it is none." >&2
  exit 2
fi

# The output appears when it is complete.
trap 'rm -f "$output.partial"' EXIT
: > "$output.partial"
echo "${NETWORKS:-$depths}" | tr ',' '\n' | while read -r network; do
  echo "$network" >&2
  # shellcheck disable=SC2086 # several options
  "$program" "$@" $network --json >> "$output.partial" < /dev/null || {
    echo "$0: $network failed; what it printed:" >&2
    tail -n 5 "$output.partial" >&2
    exit 1
  }
done
mv "$output.partial" "$output"
