"""What transformers knows of us once both are imported: `attn_implementation="optinfer"` and the quantizer "optinfer".

Importing optinfer must not import transformers, which takes seconds, and users import the two in either order. So a
finder in `sys.meta_path` waits for transformers' models to be imported; it does nothing else and then removes itself.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any

_WAITED_FOR = "transformers.modeling_utils"


def register() -> None:
    """Make our names known to transformers now; safe to call twice."""
    import optinfer.quantization.hf  # noqa: F401  (registers the quantizer)
    from optinfer.attention import transformers_backend

    transformers_backend.register()


def register_when_imported() -> None:
    """Register now if transformers' models are loaded, else right after they are."""
    if _WAITED_FOR in sys.modules:
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary import of transformers' models happen, then registers; works once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: Any) -> None:
                load(module)
                register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
