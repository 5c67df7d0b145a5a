"""Where the nodes of a drawing lie: the forward runs down, its reverse up beside it.

Each unit is a block of rows with three lanes: its forward nodes, the gradient nodes and the
curvature nodes that were generated from it. Blocks follow each other as the forward runs, so what
was generated from an operator lies next to it. The page has the same layout, in page.js.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hesscale_fx.inspect.nodes import GENERATED, Record, Records

LANES = ("forward", *GENERATED)
HEIGHT, GAP, ROW, LANE_GAP, HEADER, INSET = 34.0, 14.0, 52.0, 50.0, 20.0, 10.0
# More boxes than this are not readable on one page.
READABLE = 160


@dataclass(eq=False)
class Box:
    """What is drawn as one: a node, or one role of a collapsed module or unit."""

    id: str
    lane: str
    members: list[Record] = field(default_factory=list)
    x: float = 0.0  # of the middle
    y: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether all its values are exact."""
        return all(r.exact for r in self.members)


@dataclass(eq=False)
class Block:
    """The rows of one unit, or of a collapsed module."""

    id: str
    module: str
    whole: bool  # a module with all that it contains
    collapsed: bool  # one box a lane
    region: int = -1  # -1: of no unit
    structure: str = ""
    lanes: dict[str, list[Box]] = field(default_factory=lambda: {lane: [] for lane in LANES})

    def takes(self, r: Record) -> bool:
        """Whether a forward node that follows belongs in here."""
        other = r.regions and self.region >= 0 and r.regions[0] != self.region
        if r.role == "input" and self.lanes["forward"][0].members[0].role != "input":
            return False
        return not self.whole and self.module == r.module and not other

    def add(self, r: Record, lane: str) -> Box:
        """Put a node in."""
        boxes = self.lanes[lane]
        if not self.collapsed:
            boxes.append(Box(r.name, lane, [r]))
        elif boxes:
            boxes[0].members.append(r)
        else:
            boxes.append(Box(f"{self.id} {lane}", lane, [r]))
        return boxes[-1]


@dataclass(frozen=True)
class Frame:
    """A rectangle around a module or a region."""

    label: str
    kind: str  # "module" or "region"
    left: float
    top: float
    right: float
    bottom: float


def fill(found: Records, depth: int) -> tuple[list[Block], dict[str, Box]]:
    """The blocks, and the box of each node that is drawn; sizes, read everywhere, are not."""
    blocks: list[Block] = []
    closed: dict[str, Block] = {}
    block_of: dict[str, Block] = {}
    box_of: dict[str, Box] = {}
    shown = [r for r in found if r.shape]
    some = depth < levels(found)
    for r in shown:
        if r.role not in ("forward", "input"):
            continue
        parts = r.module.split(".") if r.module else []
        if len(parts) >= depth and r.role != "input":
            path = ".".join(parts[:depth])
            if path not in closed:
                closed[path] = Block(f"module {path}", path, True, True)
                blocks.append(closed[path])
            block = closed[path]
        else:
            if not blocks or not blocks[-1].takes(r):
                blocks.append(Block(f"unit {r.name}", r.module, False, some and r.role != "input"))
            block = blocks[-1]
            if r.regions:
                block.region, block.structure = r.regions[0], r.structure
        block_of[r.name] = block
        box_of[r.name] = block.add(r, "forward")
    users = {name: r.name for r in reversed(shown) for _, name in r.inputs}
    for r in shown:
        origins = [n if n in block_of else users.get(n, "") for n in (*r.forward, r.name)]
        near = [block_of[n] for n in origins if n in block_of]
        if r.role in GENERATED and near:
            box_of[r.name] = near[-1].add(r, r.role)
        elif r.role in ("parameter", "buffer") and near and not near[-1].collapsed:
            box_of[r.name] = near[-1].add(r, "forward")
    return blocks, box_of


class Layout:
    """Boxes with their places, and frames around them; y runs down.

    Args:
        found: the nodes.
        depth: modules at this depth are collapsed.
        width: of a box.
    """

    def __init__(self, found: Records, depth: int, width: float) -> None:
        self.width = width
        self.blocks, self.box_of = fill(found, depth)
        self.boxes = [b for block in self.blocks for lane in LANES for b in block.lanes[lane]]
        self.frames: list[Frame] = []
        self._place()

    def _place(self) -> None:
        rows = {id(b): {lane: self._rows(b.lanes[lane]) for lane in LANES} for b in self.blocks}
        step = self.width + GAP
        start, left = {}, 0.0
        for lane in LANES:
            columns = max((len(r) for b in self.blocks for r in rows[id(b)][lane]), default=1)
            start[lane] = (left, columns)
            left += columns * step + LANE_GAP
        self.right = left - LANE_GAP - GAP
        open_: list[tuple[str, float]] = []  # modules around the current block, with their tops
        y = 0.0
        for block in self.blocks:
            y = self._frame_modules(block.module, open_, y)
            count = max(len(rows[id(block)][lane]) for lane in LANES)
            for lane in LANES:
                # Up beside it: a lane of the reverse begins at the lowest row.
                for i, row in enumerate(rows[id(block)][lane]):
                    level = i if lane == "forward" else count - 1 - i
                    x, columns = start[lane]
                    for k, box in enumerate(row):
                        box.x = x + (k + (columns - len(row)) / 2) * step + self.width / 2
                        box.y = y + level * ROW + HEIGHT / 2
            bottom = y + count * ROW - (ROW - HEIGHT)
            if block.region >= 0:
                label = "" if block.collapsed else block.structure
                frame = Frame(label, "region", -4, y - 4, self.right + 4, bottom + 4)
                self.frames.append(frame)
            y = bottom + GAP
        self._frame_modules("", open_, y)
        self.bottom = y
        self.frames.sort(key=lambda f: (f.kind != "module", f.top))

    def _frame_modules(self, module: str, open_: list[tuple[str, float]], y: float) -> float:
        """Close the frames that a block is not in, open those that it is in."""
        parts = module.split(".") if module else []
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]
        while open_ and (len(open_) > len(around) or around[len(open_) - 1] != open_[-1][0]):
            path, top = open_.pop()
            out = INSET * max(1, 6 - len(open_))
            self.frames.append(Frame(path, "module", -out, top, self.right + out, y - GAP / 2 + 4))
            y += INSET
        for path in around[len(open_) :]:
            open_.append((path, y))
            y += HEADER
        return y

    @staticmethod
    def _rows(boxes: list[Box]) -> list[list[Box]]:
        """Boxes by the longest way to them from the first of their lane."""
        level: dict[str, int] = {}
        found: list[list[Box]] = []
        # Leaves were added last; they come first.
        for box in sorted(boxes, key=lambda b: b.members[0].role in ("forward", *GENERATED)):
            inputs = [level[n] for _, n in box.members[0].inputs if n in level]
            level[box.id] = at = max(inputs, default=-1) + 1
            if at == len(found):
                found.append([])
            found[at].append(box)
        return found


def levels(found: Records) -> int:
    """One more than the depth of the deepest module; drawn at this depth nothing is collapsed."""
    return max((r.module.count(".") + 2 for r in found if r.module), default=1)


def readable_depth(found: Records) -> int:
    """The deepest that has few enough boxes, but at least the outermost modules."""
    for depth in range(levels(found), 1, -1):
        if len({id(b) for b in fill(found, depth)[1].values()}) <= READABLE:
            return depth
    return 1
