"""`accelerate launch -m clip_probe ...`"""

from clip_probe.cli import main

if __name__ == "__main__":
    main(prog_name="clip-probe")
