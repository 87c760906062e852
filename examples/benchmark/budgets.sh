#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Measures time against memory: two networks under memcnn_benchmark, with a list of
# budgets, and under Python packages. Draws what it has measured.

set -eu

if [ $# -ne 3 ]; then
  echo "usage: $0 PROGRAM FOLDER SVG"
  echo "  PROGRAM   path of memcnn_benchmark"
  echo "  FOLDER    gets what was measured, ours.jsonl and peers.jsonl"
  echo "  SVG       figure to write"
  echo "  NETWORKS  environment variable: other networks, as in sweep.sh"
  echo "  VENV      environment variable: a folder whose bin/ has the python3 for"
  echo "            peers.py, where it is another than that for figures.py"
  [ "${1-}" = --help ] && exit 0
  exit 2
fi

here=$(dirname "$0")
program=$1
folder=$2
figure=$3
budgets=0,12.5%,25%,37.5%,50%,75%,all
engines=plain,checkpoint,wrapper,sequence-budget,checkpoint-sequential-budget
small="--depth 27 --channels 16 --batch 20 --size 32 --steps 15"
large="--depth 9 --channels 64 --batch 32 --size 32 --steps 7"
export NETWORKS="${NETWORKS:-$small, $large}"

mkdir -p "$folder"
"$here/sweep.sh" "$program" "$folder/ours.jsonl" --engines $engines --budget $budgets
PATH=${VENV:+$VENV/bin:}$PATH "$here/sweep.sh" "$here/peers.py" "$folder/peers.jsonl"
"$here/figures.py" --benchmark "$folder/ours.jsonl" --peers "$folder/peers.jsonl" \
  --budgets "$figure"
