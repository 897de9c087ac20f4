"""What a block and an architecture say of names."""

from __future__ import annotations

from collections.abc import ItemsView

from marlinctl.models.architectures import Block, Chain, LinearSpec

LINEARS = 3000


class _Counted(dict[str, str]):
    """Counts how often all of it is looked at."""

    walks = 0

    def items(self) -> ItemsView[str, str]:  # type: ignore[override]
        self.walks += 1
        return super().items()


def test_names_of_thousands_of_linears_are_looked_up_and_not_searched() -> None:
    """If each linear were searched among all renamed ones, a block of 3,000 would take nine million comparisons, and a plan minutes."""
    modules = [f"mixer.{i}.proj" for i in range(LINEARS)]
    renamed = _Counted({f"m.0.ff.{i}.w.weight": f"m.0.{module}.weight" for i, module in enumerate(modules)})
    specs = {f"m.0.ff.{i}.w": LinearSpec(f"m.0.ff.{i}.w", 8, 8, False) for i in range(LINEARS)}
    block = Block(0, "m.0", (Chain("mixer", tuple((module,) for module in modules)),), specs, {}, renamed)
    assert [spec.name for (spec,), _ in block.stages()] == list(specs)
    assert renamed.walks == 1
    assert block.linear("mixer.own") == "m.0.mixer.own"
