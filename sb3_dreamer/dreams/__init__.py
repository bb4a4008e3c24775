"""Dreams made visible: what the model predicts, next to what happened.

``open_loop`` dreams on from real steps, ``horizon_errors`` measures the errors of these dreams, ``find_trouble`` names
other problems; ``DreamCallback`` logs all of it in training, and ``python -m sb3_dreamer.dreams`` writes it as a page.
"""

from sb3_dreamer.dreams.callback import DreamCallback
from sb3_dreamer.dreams.collect import collect
from sb3_dreamer.dreams.horizon import HorizonError, horizon_errors
from sb3_dreamer.dreams.open_loop import OpenLoop, open_loop
from sb3_dreamer.dreams.report import write_report
from sb3_dreamer.dreams.trouble import find_trouble, signs_of

__all__ = [
    "DreamCallback",
    "HorizonError",
    "OpenLoop",
    "collect",
    "find_trouble",
    "horizon_errors",
    "open_loop",
    "signs_of",
    "write_report",
]
