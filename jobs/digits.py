"""The demo's world: scikit-learn's digits (1,797 real images of 8 x 8), a small CNN trained on them, a few queries.

`python -m jobs.digits FOLDER` writes train.parquet, queries.parquet and cnn.safetensors; jobs/specs/digits.yaml runs on them.
With `--models 3` also cnn-1.safetensors and cnn-2.safetensors, trained from other seeds; jobs/specs/ensemble.yaml runs on all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

TRAIN_ROWS = 1437
"""First rows of the data set train, the other 360 test, as is usual for digits (other hands wrote them)."""
EPOCHS = 12
BATCH_ROWS = 64
COPIES = 4
MISTAKES = 4
SEED = 0


def cnn(width: int = 16) -> nn.Module:
    """A CNN for 8 x 8 digits: two 3 x 3 convolutions with pooling, two linear layers; [B, 1, 8, 8] -> logits [B, 10]."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """An MLP for 8 x 8 digits: 64-64-32-10 with ReLU; [B, 1, 8, 8] -> logits [B, 10]."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 64] in [0, 1] as float32, labels [1797] as int64."""
    import numpy as np
    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int64)


def train(pixels: np.ndarray, labels: np.ndarray, epochs: int = EPOCHS, seed: int = SEED, width: int = 16) -> nn.Module:
    """The CNN trained with SGD (lr .05, momentum .9, batch 64), in eval mode; the same seed gives the same weights."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cnn(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.from_numpy(pixels).view(-1, 1, 8, 8), torch.from_numpy(labels)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH_ROWS):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def write_demo(folder: Path, models: int = 1) -> None:
    """Write the demo's corpus, queries and weights. Queries: copies of training images, and test images it gets wrong.

    Args:
        folder: Where to.
        models: How many trainings to write the weights of; the queries are about the first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import safetensors.torch
    import torch

    pixels, labels = load_digits()
    model = train(pixels[:TRAIN_ROWS], labels[:TRAIN_ROWS])
    with torch.inference_mode():
        guess = model(torch.from_numpy(pixels).view(-1, 1, 8, 8)).argmax(dim=1).numpy()
    wrong = [i for i in range(TRAIN_ROWS, len(labels)) if guess[i] != labels[i]][:MISTAKES]
    copies = [int(i) for i in torch.randperm(TRAIN_ROWS, generator=torch.Generator().manual_seed(SEED))[:COPIES]]
    names = [f"copy-of-{i}" for i in copies] + [f"test-{i}-taken-for-{guess[i]}" for i in wrong]
    folder.mkdir(parents=True, exist_ok=True)
    ids = pa.array([f"digit-{i}" for i in range(TRAIN_ROWS)])
    pq.write_table(
        pa.table({"id": ids, "pixels": list(pixels[:TRAIN_ROWS]), "label": labels[:TRAIN_ROWS]}),
        folder / "train.parquet",
    )
    rows = copies + wrong
    pq.write_table(
        pa.table({"query_id": names, "pixels": list(pixels[rows]), "label": labels[rows]}), folder / "queries.parquet"
    )
    safetensors.torch.save_file(model.state_dict(), folder / "cnn.safetensors")
    for other in range(1, models):
        again = train(pixels[:TRAIN_ROWS], labels[:TRAIN_ROWS], seed=SEED + other)
        safetensors.torch.save_file(again.state_dict(), folder / f"cnn-{other}.safetensors")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--models", type=int, default=1, help="trainings to write the weights of, from as many seeds")
    given = parser.parse_args()
    write_demo(given.folder, given.models)


if __name__ == "__main__":
    main()
