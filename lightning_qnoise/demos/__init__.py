"""Small models and data that need no download: what the README, the notebooks and the tests train.

Two tasks, each a few seconds of training on two CPU cores: handwritten digits with a residual convolutional
net, and English reference text with a Transformer language model.
"""

from lightning_qnoise.demos.bpe import BPE
from lightning_qnoise.demos.digits import DigitsClassifier, DigitsData
from lightning_qnoise.demos.lm import TransformerLM
from lightning_qnoise.demos.text import ReferenceText

__all__ = ["BPE", "DigitsClassifier", "DigitsData", "ReferenceText", "TransformerLM"]
