"""What each job takes on the command line: apart from the jobs, so that --help imports none."""

import argparse

GIN_PREFIX = "--gin."


def add_gin_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the gin flags: ``gin_file``, ``gin_bindings``, ``gin_search_paths``, all list[str].

    They are the arguments of `t5g2.config.parse`.
    """
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file; may be repeated, later ones win. configs/... names the shipped ones too",
    )
    # Only for --help and as the default: `_take_gin_bindings` removes these flags before argparse.
    group.add_argument(
        f"{GIN_PREFIX}NAME",
        dest="gin_bindings",
        action="append",
        default=[],
        metavar="VALUE",
        help="set a setting (--gin.train.seed=1) or macro (--gin.STEPS=10); text needs no quotes",
    )
    group.add_argument(
        "--gin_search_paths",
        action="extend",
        type=lambda text: [path for path in text.split(",") if path],
        default=[],
        metavar="DIR[,DIR]",
        help="further directories to look for gin files in",
    )


def train(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 train`."""
    parser.add_argument(
        "--run_dir", required=True, metavar="DIR", help="where the run lives; goes on if it exists"
    )
    add_gin_arguments(parser)


def import_weights(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 import`."""
    parser.add_argument(
        "directory", metavar="HF_DIR", help="Hugging Face directory of T5Gemma 2 or Gemma 3"
    )
    _out(parser, "new checkpoint directory")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="*.model, tokenizer.json, or directory with one (default: HF_DIR)",
    )
    parser.add_argument(
        "--rope_factor_global",
        type=float,
        metavar="FACTOR",
        help="linear position interpolation of global layers (default: the source's own)",
    )
    vision = parser.add_mutually_exclusive_group()
    vision.add_argument(
        "--vision_from",
        metavar="DIR",
        help="directory of T5Gemma 2 or Gemma 3 whose vision tower a text model is given",
    )
    vision.add_argument("--no_vision", action="store_true", help="leave the vision tower out")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 evaluate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint", metavar="DIR", help="t5g2 checkpoint or Hugging Face directory"
    )
    what.add_argument("--run_dir", metavar="DIR", help="run whose newest checkpoint it is")
    tasks = parser.add_argument_group("seqio Tasks, in place of held-out loss")
    tasks.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="Task or Mixture that importing the module registers; may be repeated",
    )
    tasks.add_argument("--split", help="(default: validation)")
    tasks.add_argument(
        "--examples", type=int, metavar="N", help="the first so many of each Task (default: all)"
    )
    for side in ("inputs", "targets"):
        tasks.add_argument(
            f"--{side}_length", type=int, metavar="N", help="(default: as the model was trained)"
        )
    tasks.add_argument(
        "--all", action="store_true", help="all checkpoints of the run that are not done yet"
    )
    tasks.add_argument(
        "--follow", action="store_true", help="these, and those to come until the run ends"
    )
    tasks.add_argument(
        "--out", metavar="DIR", help="where results go (default: eval/ in the run directory)"
    )
    add_gin_arguments(parser)


def long_context(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 long_context`."""
    _checkpoint(parser)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        metavar="N",
        help="encoder tokens of the examples (default: 1024 2048 4096)",
    )
    parser.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help="niah_single_1, vt, cwe, fwe, qa, mrcr_2, ...: docs/long-context.md (default: all)",
    )
    parser.add_argument(
        "--examples", type=int, default=50, metavar="N", help="of a family at a length"
    )
    parser.add_argument(
        "--haystack",
        metavar="FILE",
        help="text to hide needles in: a file, a directory of .txt and .md, or 'corpus', the "
        "held-out documents of the checkpoint's own (default, if it has one)",
    )
    parser.add_argument(
        "--questions",
        metavar="JSONL",
        help="lines with question, answers and paragraph, for qa",
    )
    parser.add_argument(
        "--form",
        choices=("prefix", "infill"),
        default="prefix",
        help="whether the encoder's text ends where the answer is, or goes on",
    )
    parser.add_argument(
        "--rope_factor_global",
        type=float,
        metavar="FACTOR",
        help="linear position interpolation of global layers (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--tokens_per_batch",
        type=int,
        default=16_384,
        metavar="N",
        help="encoder and decoder tokens of a batch",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the examples")
    parser.add_argument(
        "--out", metavar="DIR", help="write long_context.json, long_context.svg and all answers"
    )


def generate(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 generate`."""
    _checkpoint(parser)
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        help="text to continue, or to fill in where it says <sentinel_0>, <sentinel_1>, ...; "
        "may be repeated",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image for <start_of_image> in each text, or before it; may be repeated",
    )
    parser.add_argument(
        "--pan_and_scan", action="store_true", help="show long images in crops, too"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy"
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="sample from the K likeliest")
    parser.add_argument("--top_p", type=float, metavar="P", help="sample from the likeliest P")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def average(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 average`."""
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="run to average")
    parser.add_argument(
        "--last", type=int, default=5, metavar="N", help="number of checkpoints (default: 5)"
    )
    parser.add_argument(
        "--sum_dtype",
        choices=("float32", "float64"),
        default="float32",
        help="what is summed in (default: float32); the mean is float32",
    )
    _out(parser, "new checkpoint directory")


def export(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 export`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="t5g2 checkpoint")
    _out(parser, "new Hugging Face directory")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the exported weights (default: as in the checkpoint)",
    )


def cache(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 cache`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="the cache; goes on if it was begun")
    what.add_argument("--verify", metavar="DIR", help="compare a cache's bytes with its checksums")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="SOURCE",
        help="source of the mixture file; may be repeated (default: all)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="number of processes (default: one a core)"
    )
    parser.add_argument(
        "--vision",
        metavar="CHECKPOINT",
        help="store what its vision tower makes of images, in place of the images",
    )
    parser.add_argument(
        "--runner", metavar="NAME", help="Apache Beam runner to write with, such as DirectRunner"
    )
    parser.add_argument(
        "--runner_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Beam's pipeline option; may be repeated",
    )
    add_gin_arguments(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 plan`."""
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="the machine, such as v5p:4x4x4, v5e-16, h100:8 or cpu:8",
    )
    parser.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="try meshes, microbatches and remat policies; compile the N that look best (3)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there, too")
    add_gin_arguments(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `t5g2 inspect`."""
    parts = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    data = parts.add_parser("data", help="examples of each denoiser, lengths, fill and padding")
    data.add_argument(
        "--run_dir", metavar="DIR", help="the run whose data it is; or give --gin_file"
    )
    data.add_argument(
        "--examples", type=int, default=2, metavar="N", help="of each denoiser and each source"
    )
    data.add_argument("--batches", type=int, default=16, metavar="N", help="to take statistics of")
    one = data.add_mutually_exclusive_group()
    one.add_argument(
        "--step", type=int, metavar="N", help="of the run: the batch of this step, made again"
    )
    one.add_argument(
        "--batch", type=int, metavar="N", help="of the run: the batch of this number, made again"
    )
    data.add_argument("--split", choices=("train", "heldout"), default="train")
    data.add_argument("--html", metavar="FILE", help="write a page there, instead of text")
    add_gin_arguments(data)
    config = parts.add_parser("config", help="every setting with its value; parameter counts")
    add_gin_arguments(config)
    checkpoint = parts.add_parser("checkpoint", help="what a checkpoint holds")
    checkpoint.add_argument("checkpoint", metavar="DIR")
    runs = parts.add_parser("run", help="how a run stands and what looks wrong; several compared")
    runs.add_argument(
        "run_dirs", nargs="+", metavar="DIR", help="run directory; several are compared"
    )
    runs.add_argument("--html", metavar="FILE", help="write a page there, instead of text")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="t5g2 checkpoint or Hugging Face directory",
    )


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help=what)
