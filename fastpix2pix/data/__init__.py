"""Pairs from files to batches on the training device."""

from fastpix2pix.data.loader import Batch, Loader, load_pair, open_loader
from fastpix2pix.data.options import LoaderOptions
from fastpix2pix.data.pairs import Pair, find_pairs

__all__ = ["Batch", "Loader", "LoaderOptions", "Pair", "find_pairs", "load_pair", "open_loader"]
