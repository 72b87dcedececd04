#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the GPU tests, the kernels' speed, and dense against sparse on a model of
# SD3.5-Medium's shape with random weights. Results are written to the directory given (default: benches/results).
#
#     bash benches/gpu_suite.sh [DIRECTORY]
#
# Every part runs even if one before it failed; the exit status says whether all of them succeeded. PARTS chooses some
# of them by name: PARTS="tests steps" bash benches/gpu_suite.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=PASSIVE TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1

results="${1:-benches/results}"
parts="${PARTS:-tests steps large iteration lookahead rehearsal}"
mkdir -p "$results"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,memory.used --format=csv || true

failed=()
part() {
  local name="$1"
  shift
  [[ " $parts " == *" $name "* ]] || return 0
  echo "== $name: $*"
  local start=$SECONDS
  "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
}

model=(--model sd35_medium_random --prompts 1 --group-size 24 --override sampler.micro_batch=8)
# only the files with tests for a GPU: a package that others need may be missing here
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests)
part tests python -m pytest -q -m gpu "${files[@]}" tests/triton --junitxml "$results/gpu_tests.xml"
# the latents of nine samples of SD3.5-Medium, where launches count
for op in sde_step sde_log_prob sde_log_prob_kl euler_jump grpo_loss; do
  part steps python "benches/bench_$op.py" --batch 9 --output "$results/${op}_gpu.json"
done
# 64 MiB per tensor, more than the caches hold, where bandwidth counts
for op in sde_step sde_log_prob euler_jump; do
  part large python "benches/bench_$op.py" --batch 256 --rounds 10 --output "$results/${op}_large_gpu.json"
done
# a merged copy in the base's precision; previews, because the full decoder of such a model costs as much as a forward
cheap=(--copy-dtype bfloat16 --decoder preview)
part iteration python benches/bench_iteration.py "${model[@]}" "${cheap[@]}" --rounds 3 \
  --output "$results/iteration_gpu.json"
part lookahead python benches/bench_lookahead.py "${model[@]}" "${cheap[@]}" --plan nodes:4,7 --rounds 3 \
  --output "$results/lookahead_gpu.json"
part rehearsal python benches/gpu_rehearsal.py --prompts 1 --group-size 24 --override sampler.micro_batch=8 \
  --output "$results/gpu_rehearsal_gpu.json"

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
