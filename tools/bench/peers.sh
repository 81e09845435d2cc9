#!/usr/bin/env bash
# Virtual environments of peers whose requirements do not fit our lock, with Python 3.11 and uv.
#
#   tools/bench/peers.sh ENVROOT [NAME...]       all by default
#
# img2dataset      wants pandas below 3 and albumentations below 2
# clip-benchmark   with open_clip's own trainer, which webdataset 1 breaks, and needs pandas;
#                  CLIP_benchmark's accuracy wants numpy below 2.4
# clip-retrieval   its client, and autofaiss: numpy below 2, pyarrow below 20. Of clip-retrieval's
#                  own dependencies only what these two need; so the list is whole
#
# What is not pinned here is as it was on one day. An environment with these very pins is left alone.
set -euo pipefail

day=2026-11-24
declare -A pins=(
    [img2dataset]="img2dataset==1.47.0 albumentations==1.4.24 numpy==2.4.6 pandas==2.3.3
        pyarrow==26.0.1 wandb==0.31.0 webdataset==0.2.111"
    [clip-benchmark]="clip-benchmark==1.6.2 numpy==2.3.5 open-clip-torch==3.3.0 pandas==3.1.1
        requests==2.34.2 torch==2.15.0 torchvision==0.29.2 webdataset==0.2.86"
    [clip-retrieval]="clip-retrieval==2.45.0 autofaiss==2.18.0 certifi==2026.10.18
        charset-normalizer==3.5.2 embedding-reader==1.8.1 faiss-cpu==1.15.1 fire==0.6.0
        fsspec==2026.9.0 idna==3.20 numpy==1.26.4 packaging==26.3 pandas==2.3.3 pyarrow==19.0.1
        python-dateutil==4.0.0 pytz==2026.6 requests==2.34.2 six==1.17.0 termcolor==3.3.0
        tqdm==4.70.1 tzdata==2026.6 urllib3==2.8.0"
)
declare -A options=([clip-retrieval]=--no-deps)
declare -A modules=([img2dataset]=img2dataset [clip-benchmark]=clip_benchmark,open_clip_train.data
    [clip-retrieval]=autofaiss,requests)

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
        uv pip install --quiet --compile-bytecode --exclude-newer "$day" ${options[$name]:-} \
            --python "$env/bin/python" ${pins[$name]}
        NO_ALBUMENTATIONS_UPDATE=1 "$env/bin/python" -c "import ${modules[$name]}"
        echo "$made" >"$env/pins"
    fi
    echo "$name: $env"
done
