"""Template limits: Jinja's sandbox, whose templates end: in seconds of CPU time, and with texts that fit into memory.

Templates of tasks and of chats may come from others. Jinja's own sandbox keeps them from Python and bounds ``range``,
but loops inside of loops, macros that call themselves and texts that are doubled again and again have no bound there.
Steps are counted where Jinja lets them be: at each turn of a loop, call, filter and joining operator. That holds in
any thread and any process.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, wraps
from string import Formatter
from typing import Any

from jinja2 import nodes, pass_context, pass_environment, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, LoopContext, str_join
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0
"""CPU seconds that a template may take for one row or conversation; ordinary ones take some microseconds."""
MAX_CHARACTERS = 100_000_000
"""Characters, and elements of lists, that a template may make for one row or conversation, all its steps together."""
TEXTS = (str, bytes)
CONTAINERS = (list, tuple, dict)
LOOK_EVERY = 64
"""Steps between two looks at the clock, which take as long as a step."""
PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?([-#0 +\d.*]*)")
"""A field of a format with percent signs, and its width and precision."""


class TemplateLimitError(SecurityError):
    """A template takes more time or memory than one may."""


class LimitedContext(Context):
    """The variables of one rendering, with what it has taken until now."""

    n_steps = 0
    n_characters = 0
    started: float | None = None
    """CPU time of this thread when the clock was first looked at; short renderings never do."""

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """Return the context of a block, which begins with what is taken already."""
        context: Any = super().derived(locals)
        context.n_steps = self.n_steps
        context.n_characters = self.n_characters
        context.started = self.started
        return context

    def step(self) -> None:
        """Count a step. Raises TemplateLimitError where the time is over."""
        self.n_steps += 1
        if self.n_steps % LOOK_EVERY:
            return

        now = time.thread_time()
        if self.started is None:
            self.started = now
        if now - self.started > MAX_SECONDS:
            raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} CPU seconds")

    def made(self, value: Any) -> Any:
        """Count what a step has made, and return it. Raises TemplateLimitError where it is too much."""
        if isinstance(value, TEXTS):
            self.n_characters += len(value)
            check_size(self.n_characters)
        elif isinstance(value, CONTAINERS):
            self.n_characters += len(value)
            check_size(self.n_characters)
            check_size(self.size(value))
        return value

    def size(self, value: Any) -> int:
        """Return about how many characters a value is when it is written out, with what is in it several times."""
        if isinstance(value, TEXTS):
            return len(value)
        if not isinstance(value, CONTAINERS):
            return 1

        known = self._sizes.get(id(value))
        if known is None:
            elements = [*value, *value.values()] if isinstance(value, dict) else value
            # With the value itself, whose id is no other's as long as it is there.
            known = (value, 1 + sum(map(self.size, elements)))
            self._sizes[id(value)] = known
        return known[1]

    @cached_property
    def _sizes(self) -> dict[int, tuple[Any, int]]:
        return {}


class _Counting(NodeTransformer):
    """Puts steps into a parsed template, where Jinja has no hook: loops, and the operator ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Let a loop count its turns."""
        self.generic_visit(node)
        node.iter = _own_call("counted", node.iter)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """Let a list count, since one in which another is twice, and so on, may be as large as no text can be."""
        return self._collected(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Let a mapping count."""
        return self._collected(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Let a tuple count; names that are assigned to are written as one."""
        return self._collected(node) if node.ctx == "load" else node

    def _collected(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(node) else _own_call("collected", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Let a joined text count."""
        self.generic_visit(node)
        return _own_call("joined", *node.nodes)


def _is_constant(node: nodes.Expr) -> bool:
    try:
        node.as_const()
    except nodes.Impossible:
        return False
    return True


def _own_call(method: str, *args: Any) -> nodes.Call:
    """Return a call of a method of the environment, which gets the context first."""
    node = nodes.EnvironmentAttribute(method)
    return nodes.Call(node, [nodes.ContextReference(), *args], [], None, None)


class _Generator(CodeGenerator):
    """Writes the Python code of a template."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        """Write a call; those of the environment's own methods need no sandbox."""
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            return super().visit_Call(node, frame, forward_caller=forward_caller)

        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits, by the hooks that Jinja has for subclasses."""

    context_class = LimitedContext
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Random texts, as many as are asked for.
        del self.globals["lipsum"]
        self.filters["join"] = _join

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> Any:
        for name, filter_ in self.filters.items():
            if not hasattr(filter_, "is_counted"):
                self.filters[name] = _counted_filter(name, filter_)
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    # Jinja names the parameters so, which keeps their names free for those of the called.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template calls, within the limits."""
        __context.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            args = _checked(__context, __obj.__name__, owner, args, kwargs)
        # A loop that goes on with other elements.
        elif args and isinstance(__obj, LoopContext):
            args = (__self.counted(__context, args[0]), *args[1:])
        return __context.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator gives, within the limits."""
        context.step()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(context, _percent_fields(left), [right])
        return context.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandboxed form of a text's ``format``, None for other values."""
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        @pass_context
        @wraps(wrapper)
        def limited(context: LimitedContext, *args: Any, **kwargs: Any) -> str:
            _check_format(context, _brace_fields(value.__self__), [*args, *kwargs.values()])
            return wrapper(*args, **kwargs)

        return limited

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]  # Jinja has a plain function there
        """Join what a template, a block or a macro writes."""
        return join_within_limits("", list(parts))

    def collected(self, context: LimitedContext, value: Any) -> Any:
        """Return a list, tuple or mapping that a template writes."""
        return context.made(value)

    def counted(self, context: LimitedContext, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop, a step each."""
        for value in values:
            context.step()
            yield value

    def joined(self, context: LimitedContext, *parts: Any) -> str:
        """Return what the operator ``~`` gives."""
        context.step()
        for part in parts:
            check_size(context.size(part))
        return context.made(str_join(parts))


def limit_chat_templates() -> None:
    """Have transformers render chat templates within the limits, from now on in this process; vLLM renders by it."""
    from transformers.utils import chat_template_utils as renderer

    module: Any = renderer
    if module.ImmutableSandboxedEnvironment is not LimitedEnvironment:
        module.ImmutableSandboxedEnvironment = LimitedEnvironment
        # Templates that are compiled already have no limits.
        module._compile_jinja_template.cache_clear()


def _wish(decorator: Callable[[Any], Any]) -> Any:
    """Return how Jinja notes what a filter wants as its first argument, by the decorator that says so."""
    return decorator(lambda: None).jinja_pass_arg


_FIRST_ARGUMENTS: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    None: lambda context: (),
    _wish(pass_context): lambda context: (context,),
    _wish(pass_eval_context): lambda context: (context.eval_ctx,),
    _wish(pass_environment): lambda context: (context.environment,),
}
"""What Jinja passes to a filter before its value, by what the filter wants."""


def _counted_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts what it makes."""
    first = _FIRST_ARGUMENTS[getattr(filter_, "jinja_pass_arg", None)]

    @wraps(filter_)
    def counted(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        context.step()
        if name in GROWTH or name == "format":
            args = _checked(context, name, value, args, kwargs)
        # Most of these have a text in the end.
        elif isinstance(value, CONTAINERS):
            check_size(context.size(value))
        return context.made(filter_(*first(context), value, *args, **kwargs))

    counted.is_counted = True  # type: ignore[attr-defined]
    return pass_context(counted)


@pass_eval_context
def _join(context: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Join the texts of a list, as Jinja's own filter does."""
    values = value if attribute is None else map(make_attrgetter(context.environment, attribute), value)
    return join_within_limits(str(d), list(map(str, values)))


# --- what is refused before it is made -------------------------------------------------------------------------------


def check_size(n_characters: int) -> None:
    """Raise TemplateLimitError where that is too much."""
    if n_characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"makes more than {MAX_CHARACTERS:,} characters")


def join_within_limits(separator: str, texts: list[str]) -> str:
    """Join texts. Raises TemplateLimitError where they are too much."""
    check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _n_indented(text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    return (1 + str(text).count("\n")) * (width if isinstance(width, int) else len(width))


def _n_replaced(text: Any, old: Any, new: Any, *_: Any) -> int:
    return str(text).count(str(old)) * len(str(new))


def _n_wrapped(text: Any, width: int = 79, break_long_words: bool = True, wrapstring: Any = "", *_: Any) -> int:
    return len(str(text)) * len(wrapstring or "")


def _width(text: Any, width: int = 80, *_: Any, **__: Any) -> int:
    return width


GROWTH: dict[str, Callable[..., int]] = {
    "batch": lambda values, linecount, fill_with=None: linecount,
    "center": _width,
    "expandtabs": lambda text, tabsize=8: text.count("\t") * tabsize,
    "indent": _n_indented,
    "ljust": _width,
    "replace": _n_replaced,
    "rjust": _width,
    "round": lambda number, precision=0, method="common": precision * 1000,
    "slice": lambda values, slices, fill_with=None: slices,
    "to_bytes": lambda number, length=1, *_, **__: length,
    "tojson": lambda value, *_, indent=None, **__: (indent or 0) * 1000,
    "wordwrap": _n_wrapped,
    "zfill": _width,
}
"""How many characters filters and methods add to what they are given, by their names and arguments."""


def _checked(context: LimitedContext, name: str, value: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments of a filter, or a method of a text or number, if what it makes is within the limits."""
    if name == "join" and len(args) == 1:
        texts = list(args[0])
        check_size(sum(map(context.size, texts)) + len(value) * len(texts))
        return (texts,)

    if name == "format":
        _check_format(context, _percent_fields(str(value)), [*args, *kwargs.values()])
    elif name in GROWTH:
        check_size(context.size(value))
        try:
            n_characters = GROWTH[name](value, *args, **kwargs)
        # Arguments that it does not take; it says so itself.
        except (TypeError, AttributeError):
            return args
        check_size(n_characters)
    return args


def _check_product(left: Any, right: Any) -> None:
    """Raise TemplateLimitError for a text or list that is repeated too often, and for too long a number."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())

    for value, times in ((left, right), (right, left)):
        if isinstance(value, (*TEXTS, list, tuple)) and isinstance(times, int):
            check_size(len(value) * times)


def _check_power(base: Any, exponent: Any) -> None:
    """Raise TemplateLimitError for too long a number."""
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * exponent)


def _check_bits(n_bits: int) -> None:
    if n_bits > MAX_RANGE:
        raise TemplateLimitError(f"computes a number of more than {MAX_RANGE:,} bits")


def _percent_fields(text: str) -> list[str]:
    """Return width and precision of the fields of a format with percent signs."""
    return PERCENT_FIELD.findall(text.replace("%%", ""))


def _brace_fields(text: str) -> list[str]:
    """Return the specifications of the fields of a format with braces. Raises ValueError for a wrong one."""
    return [spec or "" for _, name, spec, _ in Formatter().parse(text) if name is not None]


def _check_format(context: LimitedContext, fields: list[str], values: Iterable[Any]) -> None:
    """Raise TemplateLimitError for a format that writes too much, or whose widths are among the arguments."""
    if any(sign in field for field in fields for sign in "{*"):
        raise TemplateLimitError("formats a text with a width that an argument gives")

    widths = sum(int(digits) for field in fields for digits in re.findall(r"\d+", field))
    check_size(widths + len(fields) * sum(map(context.size, values)))
