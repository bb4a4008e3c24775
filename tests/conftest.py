import sys

collect_ignore = [] if sys.version_info >= (3, 11) else ["test_tianshou.py"]  # Tianshou 2 needs Python 3.11
