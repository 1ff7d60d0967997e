"""Writes needles to learn from, with a tokenizer and a mixture: what `needles.gin` trains on.

    python tools/needle_examples.py --out needles

Needles are hidden in noise and in Python's standard library (`niah_single_1` and `_2`), in contexts
of `--lengths` tokens; `t5g2 long_context` asks other ones, of another seed.
"""

import argparse
import json
from pathlib import Path

from t5g2.data.sources import STANDARD_LIBRARY, CorpusConfig, open_sources
from t5g2.data.tokenizer import load_tokenizer, train_sentencepiece
from t5g2.files import write_atomically
from t5g2.longcontext.families import FAMILIES, make_example
from t5g2.longcontext.haystack import collected
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import SENTINEL

NAMES = ("niah_single_1", "niah_single_2")
SEED = 1
# Text that the tokenizer is trained on, beside as many short problems.
_STRETCHES, _CHARACTERS = 300, 4000

MIXTURE = f"""\
[[source]]
name = "needles"
path = "needles.jsonl"
format = "prompted"
weight = 6

[[source]]
name = "text"
path = "{STANDARD_LIBRARY}"
format = "text"
weight = 1
"""


def main() -> None:
    """Writes tokenizer.model, needles.jsonl and mixture.toml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--examples", type=int, default=16_000, metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", default=[130, 160, 200, 250])
    parser.add_argument("--vocab_size", type=int, default=768)
    args = parser.parse_args()
    (source,) = open_sources(CorpusConfig())
    hay = collected(STANDARD_LIBRARY, source.documents["train"])
    material = Material(haystack=hay)
    texts = [hay.text(i * len(hay) // _STRETCHES, _CHARACTERS) for i in range(_STRETCHES)]
    for i in range(_STRETCHES):
        for name in NAMES:
            problem = FAMILIES[name].make((name, i), material, 0)
            texts.append(problem.prompt(problem.least + 200) + problem.answer)
    path = args.out / "tokenizer.model"
    train_sentencepiece(texts, path, vocab_size=args.vocab_size, sentinels=64, max_bytes=3_000_000)
    tokenizer = load_tokenizer(path)
    lines = []
    for index in range(args.examples):
        length = args.lengths[index % len(args.lengths)]
        name = NAMES[index // len(args.lengths) % len(NAMES)]
        example = make_example(name, index, length, tokenizer, material, seed=SEED)
        record = {"inputs": example.inputs.removesuffix(SENTINEL), "targets": example.answer}
        lines.append(f"{json.dumps(record)}\n")
    write_atomically(args.out / "needles.jsonl", "".join(lines))
    write_atomically(args.out / "mixture.toml", MIXTURE)


if __name__ == "__main__":
    main()
