"""`t5g2 generate`: continues a text, or fills in its sentinels."""

import argparse

from t5g2.errors import UserError
from t5g2.files import to_path
from t5g2.models.generation import Sampling
from t5g2.pretrained import load


def run(args: argparse.Namespace) -> int:
    """Generates for each `--text`, and prints as it goes."""
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise UserError("--top_k and --top_p sample: give --temperature above 0 as well")
    sampling = Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
    )
    model = load(to_path(args.checkpoint))
    for text in args.text:
        for piece in model.stream(
            text, args.image, args.max_new_tokens, sampling, pan_and_scan=args.pan_and_scan
        ):
            print(piece, end="", flush=True)
        print()
    return 0
