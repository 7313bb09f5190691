#!/usr/bin/env bash
# examples/fuse/fuse.sh       (make fuse)
#
# From candidates to a fused model, one public command after another, each shown before it runs: four experts and
# SmolLM2-135M-Instruct become one model. Everything is written below fuse-output/ in the current folder. A rerun goes on
# where the last one stopped and skips what is done; remove fuse-output/ to begin again.
set -euo pipefail
here=$(dirname "$0")
out=fuse-output
export HF_HUB_OFFLINE=1 # everything is on this disk; do not ask the hub first

step() {
  printf '\n# %s\n' "$*"
}

run() {
  printf '$ %s\n' "$*"
  "$@"
}

# Skips the command if its last file is there: the trainers write it last, and `wrpo build` writes all files or none.
unless() {
  local done=$1
  shift
  if [ -e "$done" ]; then
    printf '$ %s\n  done: %s\n' "$*" "$done"
  else
    run "$@"
  fi
}

step "The target, as a folder that every command loads"
run python -m wrpo.demo.save_model $out/target

step "What the experts' answers are worth: the demo's verifiers are the reward"
run wrpo score "$here/experts.jsonl" -o $out/sources.jsonl --verifier wrpo.demo.verifier:verify

step "A third of the prompts goes to SFT, on the best expert's answers"
unless $out/sft_split/report.json wrpo build $out/sources.jsonl -o $out/sft_split --stage sft
unless $out/sft/training_args.bin wrpo sft "$here/sft.yaml"

step "The fine-tuned target answers the other prompts five times"
run wrpo sample "$here/target.yaml" $out/sft_split/prompts.jsonl -o $out/target.jsonl --max-tokens 32
run wrpo score $out/target.jsonl -o $out/target_scored.jsonl --verifier wrpo.demo.verifier:verify

step "Triples: the best expert's answer, the target's best and its worst"
unless $out/triples/report.json wrpo build $out/sources.jsonl $out/target_scored.jsonl -o $out/triples --cut_answers keep
unless $out/wrpo/training_args.bin wrpo train "$here/wrpo.yaml"

step "Before and after, on prompts about words that training never mentioned"
run wrpo eval -o $out/eval --sources "$here/before_after.yaml" --prompts "$here/held_out.jsonl" --max-tokens 32 \
  --group-by skill --verifier wrpo.demo.verifier:verify --baseline before

step "Everything is below $out/"
echo "the fused model        $out/wrpo           AutoModelForCausalLM.from_pretrained(...) and AutoTokenizer load it"
echo "training curves        $out/wrpo/training_curves.png"
echo "rewards of candidates  $out/triples/rewards.png"
echo "triples                $out/triples/triples.jsonl"
echo "before and after       $out/eval/eval.png, every number in eval.json, every answer in scored.jsonl"
