"""What the settings `data.channels` and `data.depth` ask of the rest: what goes with them, and what they fill in."""

from __future__ import annotations

from collections.abc import Sequence

from detection.data.images import read_image
from detection.data.pipeline import Step, colour_steps, try_steps
from detection.data.proposals import ProposalSource, SearchedProposals
from detection.data.records import DataError, Index
from detection.data.spectral import RGB, ChannelStatistics, PixelFormat


def check_format(
    form: PixelFormat, steps: Sequence[Step], photometric: float, source: ProposalSource | None, drawn: bool
) -> None:
    """Refuse with a ValueError what goes with 8-bit RGB images alone, before anything is read.

    Args:
        form: of the images.
        steps: the user's augmentations, each of which is tried once.
        photometric: see `train_transform`.
        source: of proposals.
        drawn: whether the images are the scenes of this package.
    """
    if form == RGB:
        return
    if drawn:
        raise ValueError("the scenes are drawn in 8-bit RGB: leave data.channels and data.depth out")
    if form.channels < 1 or form.depth not in (8, 16):
        raise ValueError(f"data.channels {form.channels} must be positive, and data.depth 8 or 16")
    if isinstance(source, SearchedProposals):
        raise ValueError(f"Selective Search reads 8-bit RGB, not {form}: give data.proposals from files")
    try_steps([*steps, *(colour_steps(1, form) if photometric else ())], form)


def measure_channels(index: Index, form: PixelFormat, most: int = 200) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over a data set, in shares of the depth's range.

    Args:
        index: the images.
        form: channels and depth that they must have.
        most: images to look at, spread evenly: the same ones each time.

    Raises:
        DataError: none of them can be read.
    """
    statistics, problem = ChannelStatistics(form), DataError(f"{index.root}: there is no image to measure")
    for record in index.records[:: max(1, -(-len(index.records) // most))]:
        try:
            statistics.add(read_image(index.root / record.file_name, (record.height, record.width), form=form))
        except DataError as error:  # named again, and counted, when it is to be trained on
            problem = error
    if not statistics.count:
        raise problem
    return statistics.mean_and_std()
