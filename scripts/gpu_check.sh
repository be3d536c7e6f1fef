#!/usr/bin/env bash
# Check and time everything on a machine with NVIDIA GPUs: correctness first, then timing, short tables last.
#
#     scripts/gpu_check.sh FOLDER [all | kernels | ranks | quick]
#
# all: kernels, and ranks where there are at least two GPUs. quick: few cases and shapes of both, for two minutes.
# JSON and logs go to FOLDER. What compiles for most of its time runs side by side, what is timed runs alone; each step
# has a time limit, and what fails or is cut off is named at the end (exit code 1).
# For machines without network: wheels in .carry*/ are installed to a folder of their own first, and .tar.xz archives
# of installed packages unpacked there. GDN_CP_COMMIT names the commit where there is no repository.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_check.sh FOLDER [all | kernels | ranks | quick]}
mode=${2:-all}
case $mode in all | kernels | ranks | quick) ;; *) echo "unknown mode: $mode" >&2; exit 2 ;; esac
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python3}

site=$(mktemp -d)
shopt -s nullglob
wheels=(.carry*/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}" ||
    exit 3
fi
for archive in .carry*/*.tar.xz; do
  tar -C "$site" -xf "$archive" || exit 3
done
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

: >"$out/failed"
names=()
run() { # run NAME SECONDS COMMAND...: keep the log, remember a failure
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ $code -eq 0 ] || echo "$name" >>"$out/failed"
  [ $code -eq 124 ] && echo "$name: cut off after $limit s" || echo "$name: $((SECONDS - started)) s"
}
step() { # likewise, alone
  names+=("$1")
  run "$@"
}
beside() { # likewise, beside others until `together`
  names+=("$1")
  run "$@" &
}
together() { wait; }

tests() { # tests NAME SECONDS ARGUMENTS...: of pytest
  beside "$1" "$2" "$python" -m pytest -q -p no:cacheprovider -rfE "${@:3}"
}

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
jobs=$(nproc)
[ "$jobs" -gt 16 ] && jobs=16
check=(--jobs "$((jobs > 6 ? jobs - 6 : 1))" --draws 8)
chunk=(--jobs "$jobs")
layer=()
if [ "$mode" = quick ]; then
  check+=(--no-million --no-fla --only "states")
  chunk+=(--heads 16 32 --tokens 8192 --others)
  layer=(--cases 16k-one 64k-17mixed --repeats 5)
fi

kernels() {
  step doctor 120 "$python" -m gdn_cp.doctor
  local rule=(tests/gpu/test_{chunk_triton_fwd,chunk_triton_bwd,launch,launch_recording_gpu,recurrent}.py)
  beside check 400 "$python" scripts/check_kernels.py --output "$out/check.json" "${check[@]}"
  tests tests_rule 300 "${rule[@]}" -m "gpu and not multi_gpu"
  tests tests_mixer 400 tests/gpu tests/unit -m "gpu and not multi_gpu" "${rule[@]/#/--ignore=}"
  [ "$mode" = quick ] || beside sanitize 300 bash scripts/sanitize_kernels.sh "$out"
  together
  step chunk 400 "$python" scripts/bench_kernels.py chunk --output "$out/chunk.json" "${chunk[@]}"
  step decode 60 "$python" scripts/bench_kernels.py decode --output "$out/decode.json"
  step gate 60 "$python" scripts/bench_kernels.py gate --output "$out/gate.json"
  [ "$mode" = quick ] || step segments 120 "$python" scripts/bench_segments.py --output "$out/segments.json"
}

ranks() {
  local count=2
  [ "$gpus" -ge 4 ] && count=4
  local torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$count")
  export PYTHONPATH="$PWD/scripts:$PYTHONPATH"
  tests tests_ranks 900 tests -m multi_gpu
  # Compiles for both layers: on a slow host longer than anything that is timed.
  beside warm_up 300 "${torchrun[@]}" scripts/bench_layer.py --cases tiny-3mixed --repeats 1 --calls 1 \
    --output "$out/warm_up.json"
  together
  step exchange 120 "${torchrun[@]}" scripts/bench_exchange.py --output "$out/exchange.json"
  step layer 400 "${torchrun[@]}" scripts/bench_layer.py --shares 0 --output "$out/layer.json" "${layer[@]}"
  step planner 120 "${torchrun[@]}" scripts/bench_planner.py --output "$out/planner.json"
  [ "$mode" = quick ] || step proxy 240 "${torchrun[@]}" scripts/bench_proxy.py --output "$out/proxy.json"
}

[ "$mode" = ranks ] || kernels
if [ "$mode" != kernels ] && [ "$gpus" -ge 2 ]; then
  ranks
fi

for name in "${names[@]}"; do
  echo "== $name"
  tail -n 45 "$out/$name.log"
done
echo "failed: $(paste -sd' ' "$out/failed")"
[ ! -s "$out/failed" ]
