"""`accelerate launch -m clip_train ...`"""

from clip_train.cli import main

if __name__ == "__main__":
    main(prog_name="clip-train")
