"""A widget that lives in three places from one JavaScript module.

With a kernel (JupyterLab, Colab) it is an ordinary anywidget. In a static page it is the same module, inlined in the
output's ``text/html`` with a small stand-in for the model; it then needs no kernel and makes no network request.
"""

import html
import json
import uuid
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from optinfer.widgets.modules import inlined

_COMMON_CSS = (Path(__file__).parent / "common.css").read_text(encoding="utf-8")

_STATIC_PAGE = """\
<div id="{id}" class="oi-static" data-widget="{name}"><noscript><pre>{summary}</pre></noscript></div>
<script type="module">
const element = document.getElementById("{id}");
const style = document.createElement("style");
style.textContent = {css};
const url = URL.createObjectURL(new Blob([{esm}], {{ type: "text/javascript" }}));
const module = await import(url);
URL.revokeObjectURL(url);
const state = {state};
const listeners = {{}};
const model = {{
  get: (name) => state[name],
  set(name, value) {{
    if (state[name] === value) return;
    state[name] = value;
    for (const listener of listeners["change:" + name] ?? []) listener();
  }},
  save_changes() {{}},
  on(event, listener) {{ (listeners[event] ??= []).push(listener); }},
  off(event, listener) {{ listeners[event] = (listeners[event] ?? []).filter((l) => l !== listener); }},
  send() {{}},
}};
element.before(style);
await module.default.render({{ model, el: element }});
element.dataset.ready = "true";
</script>
"""


class StaticWidget(anywidget.AnyWidget):
    """Base of the course's widgets.

    A subclass sets ``_esm`` to the path of a module (`inlined` takes in what it imports) with ``export default { render }``,
    whose root element has class ``oi``; optionally ``_widget_css``; and tags the traits that the module reads with
    ``sync=True``. All logic that must work without a kernel is in JavaScript over a trace that Python computed before.
    """

    _widget_css: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_css" not in vars(
            cls
        ):  # anywidget makes a further subclass for each instance, with its own trait of that name
            cls._css = _COMMON_CSS + cls._widget_css
        if isinstance(source := vars(cls).get("_esm"), Path):
            cls._esm = inlined(source)
        super().__init_subclass__(**kwargs)

    def summary(self) -> str:
        """What the figure shows, in a few lines of text, for readers without scripts."""
        return type(self).__name__

    def static_state(self) -> dict[str, Any]:
        """The traits that the module may read, as plain data."""
        own = [name for name in self.traits(sync=True) if not name.startswith("_") and name in self._own_trait_names()]
        return {name: getattr(self, name) for name in own}

    @classmethod
    def _own_trait_names(cls) -> set[str]:
        return set(cls.class_trait_names()) - set(anywidget.AnyWidget.class_trait_names())

    def static_html(self) -> str:
        """The widget as a fragment of HTML that needs no kernel and no network."""
        return _STATIC_PAGE.format(
            id=f"oi-{uuid.uuid4().hex[:12]}",
            name=type(self).__name__,
            summary=html.escape(self.summary()),
            css=_as_script(str(self._css)),
            esm=_as_script(str(self._esm)),
            state=_as_script(self.static_state()),
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        data = {**(data or {}), "text/html": self.static_html(), "text/plain": self.summary()}
        return (data, metadata) if isinstance(bundle, tuple) else data


def _as_script(value: object) -> str:
    """A JavaScript literal that cannot end the script element it stands in."""
    return json.dumps(value).replace("</", "<\\/").replace("<!--", "<\\!--")


__all__ = ["StaticWidget", "traitlets"]
