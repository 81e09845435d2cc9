#!/usr/bin/env bash
# Virtual environments of peers whose requirements do not fit our lock, with Python 3.11 and uv.
#
#   tools/bench/peers.sh ENVROOT [NAME...]       img2dataset and clip-benchmark by default
#
# img2dataset      wants pandas below 3 and albumentations below 2
# clip-benchmark   with open_clip's own trainer, which webdataset 1 breaks, and needs pandas;
#                  CLIP_benchmark's accuracy wants numpy below 2.4
#
# What is not pinned here is as it was on one day. An environment with these very pins is left alone.
set -euo pipefail

day=2026-11-24
declare -A pins=(
    [img2dataset]="img2dataset==1.47.0 albumentations==1.4.24 numpy==2.4.6 pandas==2.3.3
        pyarrow==26.0.1 wandb==0.31.0 webdataset==0.2.111"
    [clip-benchmark]="clip-benchmark==1.6.2 numpy==2.3.5 open-clip-torch==3.3.0 pandas==3.1.1
        requests==2.34.2 torch==2.15.0 torchvision==0.29.2 webdataset==0.2.86"
)
declare -A modules=([img2dataset]=img2dataset [clip-benchmark]=clip_benchmark,open_clip_train.data)

root=${1:?usage: peers.sh ENVROOT [NAME...]}
shift
[ $# -gt 0 ] || set -- "${!pins[@]}"
for name in "$@"; do
    [ -n "${pins[$name]:-}" ] || { echo "$name: unknown; there are: ${!pins[*]}" >&2; exit 2; }
    env=$root/$name made="$day ${pins[$name]}"
    if [ "$(cat "$env/pins" 2>/dev/null)" != "$made" ]; then
        uv venv --quiet --clear --python 3.11 "$env"
        # without bytecode every start would compile it, at the peer's expense
        # shellcheck disable=SC2086 -- the pins are words
        uv pip install --quiet --compile-bytecode --exclude-newer "$day" \
            --python "$env/bin/python" ${pins[$name]}
        NO_ALBUMENTATIONS_UPDATE=1 "$env/bin/python" -c "import ${modules[$name]}"
        echo "$made" >"$env/pins"
    fi
    echo "$name: $env"
done
