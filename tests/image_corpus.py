"""Pictures of one colour with captions, and a run that learns to name the colours."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from small_run import RECIPE

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
# What a tokenizer that the run trains has behind its 32 sentinels.
VISION = {
    "hidden_size": 32,
    "mlp_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "tokens_per_image": 4,
    "boi_id": 36,
    "image_id": 38,
}
EOI_ID = 37


def write_pictures(directory: Path, count: int = 200, pictures: int = 60) -> Path:
    """A manifest of captions, each of one or two pictures."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for number in range(pictures):
        colour = list(COLOURS)[number % len(COLOURS)]
        noise = rng.integers(-5, 6, (20, 31, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        names.append((f"{number}.png", colour))
        Image.fromarray(pixels).save(directory / names[-1][0])
    lines = []
    for number in range(count):
        chosen = [names[int(i)] for i in rng.integers(0, pictures, 1 + number % 3 // 2)]
        text = "<start_of_image>" * len(chosen)
        text += "a " + " square and a ".join(colour for _, colour in chosen) + " square"
        lines.append(json.dumps({"text": text, "images": [name for name, _ in chosen]}))
    (directory / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "captions.jsonl"


def write_image_mixture(home: Path, documents: list[str] | None = None) -> Path:
    """A mixture file of pictures and, if documents are given, of text."""
    write_pictures(home / "pictures")
    sources = ['[[source]]\nname = "pictures"\npath = "pictures"\nformat = "image_text"\n']
    if documents is not None:
        parts = (text[i : i + 2000] for text in documents for i in range(0, len(text), 2000))
        lines = (json.dumps({"text": part}) for part in parts)
        (home / "text.jsonl").write_text("\n".join(lines) + "\n")
        sources.append('[[source]]\nname = "text"\npath = "text.jsonl"\nweight = 1.0\n')
    (home / "mixture.toml").write_text("".join(sources))
    return home / "mixture.toml"


def write_image_recipe(home: Path, documents: list[str]) -> Path:
    """The gin file of the small run over pictures and text."""
    mixture = write_image_mixture(home, documents)
    recipe = RECIPE.replace("corpus.path = '{corpus}'", f"corpus.mixture = '{mixture}'")
    more = f"model.vision = {VISION}\nmodel.eoi_id = {EOI_ID}\ndata.images_per_row = 3\n"
    (home / "recipe.gin").write_text(recipe + more)
    return home / "recipe.gin"
