"""Programs that measure policies and length value models, and draw what they found."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ImportError("The programs under eval/ draw figures: pip install -e '.[eval]'")
