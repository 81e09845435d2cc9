"""`python -m clip_finetune`, and so `accelerate launch -m clip_finetune train …`."""

from clip_finetune.cli import main

main(prog_name="clip-finetune")
