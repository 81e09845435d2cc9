"""`accelerate launch -m clip_retrieval …`"""

from clip_retrieval.cli import main

if __name__ == "__main__":
    main(prog_name="clip-retrieval")
