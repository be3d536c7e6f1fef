#!/usr/bin/env bash
# compute-sanitizer over a small set of kernel cases: memcheck (addresses) and racecheck (shared memory).
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

# Compile first: under the tool only the kernels themselves should run.
"$python" scripts/sanitize_cases.py >"$out/sanitize_plain.log" 2>&1 || { tail -n 20 "$out/sanitize_plain.log"; exit 1; }
for tool in memcheck racecheck; do
  timeout "${SANITIZE_SECONDS:-150}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
    "$python" scripts/sanitize_cases.py >"$out/sanitize_$tool.log" 2>&1 || status=1
  echo "== $tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/sanitize_$tool.log" || tail -n 3 "$out/sanitize_$tool.log")"
done
exit $status
