"""What Python does first in every process that tests start: let it collect garbage less often.

Each imports torch, and most of them Ray, transformers or vLLM: a million objects that all stay. By Python's own
threshold a fifth of the time of these imports goes into looking through them.
"""

import gc

gc.set_threshold(100_000, 20, 20)
