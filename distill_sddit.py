"""Makes a trained pipeline better at a small number of steps, by itself (SSD and iSSD).

    sddit distill --model PIPELINE --num_inference_steps 10
    accelerate launch distill_sddit.py --model PIPELINE --num_inference_steps 10

Several numbers of steps make a chain, each stage from the last: `--num_inference_steps 20 10 5`. Killed, it
goes on with `--resume_from_checkpoint latest` where it was.
"""

from sddit_diffusers.cli import one_line_errors
from sddit_diffusers.training.distill_options import parse
from sddit_diffusers.training.distilling import distil


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors("distill_sddit.py"):
        distil(parse(arguments))


if __name__ == "__main__":
    main()
