#!/usr/bin/env bash
# Everything that needs a GPU, in one call of ten minutes: first a smoke test, then the GPU tests, the kernels' speed, and
# dense against sparse on a model of SD3.5-Medium's shape with random weights. Results are written to the directory given
# (default: benches/results), with a page of the project's bars, gpu_summary.md.
#
#     bash benches/gpu_suite.sh [DIRECTORY]
#
# Every part runs even if one before it failed; the exit status says whether all of them succeeded. PARTS chooses some
# of them by name: PARTS="smoke tests" bash benches/gpu_suite.sh. BUDGET is the time in seconds, PYTHON the interpreter.
# Wheels in the folder wheels/ are installed first, for machines without a network; they come from, for example,
#
#     pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       diffusers transformers tokenizers huggingface-hub peft accelerate safetensors pydantic pydantic-core \
#       annotated-types typing-inspection typing-extensions nvidia-ml-py pytest pluggy iniconfig hypothesis
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=PASSIVE TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1

results="${1:-benches/results}"
parts="${PARTS:-wheels build smoke tests large steps rehearsal iteration lookahead}"
budget="${BUDGET:-600}"
python="${PYTHON:-$(command -v python || command -v python3)}"
mkdir -p "$results"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,memory.used --format=csv || true

failed=()
part() {
  local name="$1"
  shift
  [[ " $parts " == *" $name "* ]] || return 0
  if ((SECONDS >= budget)); then
    failed+=("$name (no time left)")
    return 0
  fi
  echo "== $name: $*"
  local start=$SECONDS
  timeout "$((budget - SECONDS))" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
}

model=(--model sd35_medium_random --override sampler.micro_batch=8 lookahead.chunk=16)
# only the files with tests for a GPU: a package that others need may be missing here
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests)
if compgen -G "wheels/*.whl" > /dev/null; then
  part wheels "$python" -m pip install --quiet --no-index --no-deps wheels/*.whl
fi
# whoever asks for this suite has a GPU: here the CUDA library has to be there, or its tests would be left out
part build env DENSEGRPO_CUDA=1 "$python" setup.py --quiet build_ext --inplace
part smoke "$python" -m benches.gpu.smoke
part smoke "$python" -m benches.gpu.rehearsal --model embedded_random --prompts 2 --group-size 2 --rounds 1 --warmup 0 \
  --override lookahead.graphs=true --output "$results/gpu_smoke_gpu.json"
part tests "$python" -m pytest -q -m gpu "${files[@]}" tests/triton --junitxml "$results/gpu_tests.xml"
# 64 MiB per tensor, more than the caches hold, where bandwidth counts
for op in sde_step sde_log_prob euler_jump; do
  part large "$python" -m "benches.ops.bench_$op" --batch 256 --rounds 10 --output "$results/${op}_large_gpu.json"
done
# the latents of nine samples of SD3.5-Medium, where launches count
for op in sde_step sde_log_prob sde_log_prob_kl euler_jump grpo_loss; do
  part steps "$python" -m "benches.ops.bench_$op" --batch 9 --rounds 20 --output "$results/${op}_gpu.json"
done
# eight trajectories, so that a micro-batch is full
part rehearsal "$python" -m benches.gpu.rehearsal "${model[@]}" --prompts 8 --group-size 4 --rounds 1 \
  --output "$results/gpu_rehearsal_gpu.json"
# a merged copy in the base's precision; previews, because the full decoder of such a model costs as much as a forward
cheap=(--copy-dtype bfloat16 --decoder preview)
part iteration "$python" -m benches.iteration.bench_iteration "${model[@]}" --prompts 1 --group-size 8 "${cheap[@]}" --rounds 1 \
  --output "$results/iteration_gpu.json"
part lookahead "$python" -m benches.iteration.bench_lookahead "${model[@]}" --prompts 1 --group-size 8 "${cheap[@]}" \
  --plan nodes:4,7 --rounds 1 --output "$results/lookahead_gpu.json"
"$python" -m benches.gpu.summary "$results" || failed+=(summary)

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
