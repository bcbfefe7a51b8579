"""The two tasks of the comparison: a model, its data, its schedule, and the sizes at which it is quantized."""

from tasks.image import Image
from tasks.text import Text

TASKS = {"image": Image, "text": Text}
