#!/usr/bin/env bash
# compute-sanitizer over a small set of kernel cases: memcheck (addresses) and racecheck (shared memory); and over the
# fused mixer with the exchange through peers' memory, whose ranks are threads on one GPU (the barrier is left out).
#
#     scripts/sanitize_kernels.sh FOLDER
#
# Instrumented kernels run some hundred times slower, so the cases are tiny. Exit code 1 if either tool finds anything.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/sanitize_kernels.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1
python=${PYTHON:-python3}
status=0

exchange="tests/gpu/test_symmetric_one_gpu.py::test_two_micro_batches_in_flight_have_the_bits_of_one_rank[2-False]"
sanitize() { # sanitize NAME COMMAND...: compile first, for under the tool only the kernels themselves should run
  local name=$1 found
  shift
  "$@" >"$out/$name.log" 2>&1 || { tail -n 20 "$out/$name.log"; status=1; return; }
  for tool in memcheck racecheck; do
    local log="$out/${name}_$tool.log" code=0
    timeout "${SANITIZE_SECONDS:-150}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 1000 \
      "$@" >"$log" 2>&1 || code=$?
    found=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" || tail -n 3 "$log")
    if [ $tool = racecheck ] && [ $code -eq 9 ]; then
      code=0
      found=$("$python" scripts/sanitize_report.py "$log") || code=1
    fi
    [ $code -eq 0 ] || status=1
    echo "== $name, $tool: $found"
  done
}
sanitize kernels "$python" scripts/sanitize_cases.py
sanitize exchange "$python" -m pytest -q -p no:cacheprovider "$exchange"
exit $status
