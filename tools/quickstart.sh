#!/usr/bin/env bash
# From pictures to a trained and measured CLIP model, in ten minutes on two cores:
#
#     uv run tools/quickstart.sh [OUT]        (default: quickstart/)
#
# Makes the demo pictures, then only calls the six tools, as a script of your own would.
# Each step leaves one file; a step whose file is there is skipped, so a run that was
# interrupted continues, and a run that is complete has nothing left to do.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
cd "$tools/.." # `accelerate launch clip-train` is written for the repository root
out=${1:-quickstart}
samples=100000 iterations=300                                    # pairs to train on, fine-tuning steps
[ -z "${QUICKSTART_SHORT:-}" ] || { samples=6400 iterations=10; } # for the tests
mkdir -p "$out"
ran=0

# step FILE COMMAND...: run COMMAND, its JSON into FILE, unless FILE is there
step() {
    local file=$out/$1
    shift
    [ -e "$file" ] && return
    ran=1
    printf '\n$ %s\n' "$*" >&2
    mkdir -p "$(dirname "$file")"
    "$@" >"$file.part"
    mv "$file.part" "$file"
}

# 1. Pictures and captions, then shards
step log/demo.json python tools/demo_data.py "$out/demo"
step log/shards.json clip-data build "$out/demo/train.jsonl" "$out/shards" --samples-per-shard 500 --shuffle-seed 0
categories() { # STYLE SPLIT: a labelled set in CLIP_benchmark's layout
    step "log/$1-$2.json" clip-data build "$out/demo/categories-$1-$2.jsonl" "$out/sets/$1" --split "$2" \
        --label-column label --classnames "$out/demo/classnames.txt" \
        --templates "$out/demo/templates.txt"
}
for split in train val test test-no-flags; do categories twemoji "$split"; done
for style in openmoji noto; do for split in test test-no-flags; do categories "$style" "$split"; done; done
for style in twemoji openmoji noto; do
    for split in all heldout; do
        step "log/$style-$split.json" clip-data build "$out/demo/retrieval-$style-$split.jsonl" \
            "$out/sets/$style-names" --split "$split"
    done
done
step log/verify.json clip-data verify "$out/shards"

# 2. Train
step log/train.json accelerate launch clip-train \
    --model tools/quickstart_model.json --train-data "$out/shards" --output "$out/run" \
    --samples-seen "$samples" --batch-size 128 --lr 2e-3 --warmup 40 --grad-clip 1 --workers 1 \
    --zeroshot-data "$out/sets/twemoji/test" --eval-every 60
model=$out/run/model

# 3. Zero-shot classification: categories of concepts that training never saw
for split in test test-no-flags; do
    step "zeroshot-$split.jsonl" clip-probe zeroshot "$model" "$out"/sets/{twemoji,openmoji,noto} --split "$split"
done

# 4. Retrieval: an index of the unseen artist's pictures, a few queries, Recall@k
step log/index.json clip-retrieval build-index "$model" "$out/sets/noto-names/all" "$out/index"
step query.jsonl clip-retrieval query "$out/index" -k 8 --text "a red apple" --text "cat face" \
    --text "a vehicle on rails" --text "musical instrument" --image "$out/demo/twemoji/1f431.png"
for split in all heldout; do
    step "retrieval-$split.jsonl" clip-retrieval eval "$model" "$out"/sets/{twemoji,openmoji,noto}-names --split "$split"
done

# 5. Linear probes, beside the same probe on raw pixels
step log/probe.json clip-probe sweep "$model" "$out/sets/twemoji" --val-split val --save-head categories-probe \
    --output "$out/probe"
step log/pixels.json clip-probe sweep "$model" "$out/sets/twemoji" --val-split val --feature pixels --shots "" \
    --output "$out/pixels"
step probe.jsonl clip-probe eval "$model" "$out"/sets/{twemoji,openmoji,noto} --head categories-probe

# 6. Fine-tune the image tower against the frozen zero-shot head, then interpolate
step log/finetune.json clip-finetune train "$model" "$out/tuned" --task "$out/sets/twemoji" \
    --iterations "$iterations" --warmup $((iterations / 15)) --batch-size 64 --lr 3e-4 --workers 1
step log/curve.json clip-finetune curve "$model" "$out/tuned" "$out/curve" --id "$out/sets/twemoji" \
    --ood "$out/sets/openmoji" --ood "$out/sets/noto" --rule fixed
step log/interpolate.json clip-finetune interpolate "$model" "$out/tuned" "$out/interpolated" --alpha 0.5

# 7. The table and the page
step report.txt python tools/report.py "$out"
[ "$ran" = 1 ] || echo "Nothing left to do; remove $out to start again."
cat "$out/report.txt"
