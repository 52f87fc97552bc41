"""Where lanes that took different branches meet again."""

from __future__ import annotations

import numpy as np


def ranks(targets: dict[int, int], conditional: set[int], returns: set[int], count: int) -> list[int]:
    """For each of `count` instructions, its place in an order in which a join comes after all that it joins.

    Of lanes that are apart the lowest rank runs first, so they meet at the join. targets: branch -> where it goes;
    conditional: instructions with a guard.
    """
    heads = sorted({0, *targets.values(), *(branch + 1 for branch in targets)} - {count})
    ends = dict(zip(heads, [*heads[1:], count], strict=True))

    def following(head: int) -> list[int]:
        last = ends[head] - 1
        found = [targets[last]] if last in targets else []
        falls_through = last in conditional or (last not in targets and last not in returns)
        return found + [last + 1] if falls_through and last + 1 < count else found

    placed, visited, stack = [], {0}, [(0, following(0))]
    while stack:  # depth first; a block is placed once all that follow it are
        head, left = stack.pop()
        if not left:
            placed.append(head)
            continue
        stack.append((head, left[1:]))
        if left[0] not in visited:
            visited.add(left[0])
            stack.append((left[0], following(left[0])))
    order = np.concatenate([np.arange(head, ends[head]) for head in reversed(placed)])
    found = np.zeros(count, np.int64)
    found[order] = np.arange(len(order))
    return found.tolist()
