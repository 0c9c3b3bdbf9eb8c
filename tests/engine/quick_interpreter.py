"""Triton's interpreter, as ``v2_interpreter`` needs it: masks of integers, and less work that is
none of the kernels'.

What is kept here for a second time is what Triton makes anew for each operation, and is the same
each time: types of blocks, shapes, constants, and which type two operands have in common. Kernels
compute what they did.

    pytest tests/engine/test_v2.py
"""

import types
from functools import cache
from typing import Any


def install() -> None:
    """Changes Triton's interpreter in this process; to be called once."""
    _let_masks_be_integers()
    _patch_once()
    _call_directly()
    _keep_types()
    _keep_constants()


def _let_masks_be_integers() -> None:
    """The masks that vLLM's grammar kernel stores under, and its walk through candidates loads
    under, are integers to the interpreter, whose own load and store take bools only."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bools(mask: Any) -> Any:
        is_bool = mask.data.dtype == bool
        return mask if is_bool else TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *others: Any, **named: Any) -> Any:
        return load(self, ptrs, as_bools(mask), *others, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        return store(self, ptrs, value, as_bools(mask), *others)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _patch_once() -> None:
    """It patches Triton's language anew for each call of a device function, and checks every
    integer sum for overflow in 64 bits."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scopes: list[Any] = []

    def patch_once(fn: Any) -> Any:
        if not scopes:
            both = types.FunctionType(fn.__code__, {"tl": language, "core": language.core})
            scopes.append(patch(both))
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


def _call_directly() -> None:
    """It calls each of the language's functions through two others, the second of which looks
    whether the first did its work."""
    from triton.language import core
    from triton.runtime import interpreter

    looking, semantic = core.builtin(len).__code__, interpreter.interpreter_semantic

    def patch_attribute(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        looks = getattr(member, "__code__", None) is looking
        function = member.__wrapped__ if looks else member

        def call(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*args, **named)

        scope.set_attr(holder, name, call)

    interpreter._patch_attr = patch_attribute


def _keep_types() -> None:
    """A block's type, its shape and its number of elements; a tensor's shape; numpy's type for
    Triton's; the type that two operands have in common."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    block, tensor, look_up = core.block_type, core.tensor, interpreter._get_np_dtype
    shapes: dict[Any, Any] = {}
    blocks: dict[Any, Any] = {}
    dtypes: dict[str, Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        unwrap = core._unwrap_if_constexpr
        sizes = tuple([unwrap(size) for size in unwrap(shape)])
        if sizes not in shapes:
            if not sizes:
                raise TypeError("0d block_type is forbidden")
            ours = core.tuple(sizes)
            count = core.validate_block_shape(ours)
            of_tensors = core.constexpr(count), core.tuple([core.constexpr(n) for n in sizes])
            shapes[sizes] = ours, count, of_tensors
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, self.of_tensors = shapes[sizes]

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        if type(scalar_ty) is not core.dtype:
            return block(scalar_ty, self.shape)
        key = self.sizes, scalar_ty.name
        if key not in blocks:
            blocks[key] = block(scalar_ty, self.shape)
        return blocks[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors

    def np_dtype(tt_dtype: Any) -> Any:
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(tt_dtype.scalar)
        return dtypes[name]

    core.dtype.of_tensors = core.constexpr(1), core.tuple([])
    block.of_tensors = None  # of one that was made before this; none is
    block.__init__, block.with_element_ty = init_block, with_element_ty
    block.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tensor.__init__ = init_tensor
    interpreter._get_np_dtype = np_dtype
    TritonSemantic.computation_type_impl = cache(TritonSemantic.computation_type_impl)


def _keep_constants() -> None:
    """Integers as scalars of a type; and what is no constant is seen by its class."""
    from triton import language
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    make, unwrap = TritonSemantic.scalar_constant, core._unwrap_if_constexpr
    constants: dict[tuple[type, int, str], Any] = {}
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type}

    def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
        if type(value) not in (int, bool) or dtype is None:
            return make(self, value, dtype)
        key = type(value), value, dtype.name
        if key not in constants:
            constants[key] = make(self, value, dtype)
        return constants[key]

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    TritonSemantic.scalar_constant = scalar_constant
    core._unwrap_if_constexpr = unwrap_if_constexpr
    if hasattr(language, "_unwrap_if_constexpr"):
        language._unwrap_if_constexpr = unwrap_if_constexpr
