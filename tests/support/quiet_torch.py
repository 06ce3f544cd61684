"""PyTorch and transformers as references in tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Compute without gradients on one thread, which is fastest for small models, and without logs of transformers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
