"""Cut the parameters into fragments: sets of whole tensors that are synced together (streaming DiLoCo)."""

from collections.abc import Mapping


def cut_fragments(num_elements: Mapping[str, int], num_fragments: int) -> list[list[str]]:
    """Balanced fragments of named tensors; every name is in exactly one.

    Each tensor, largest first, goes to the fragment that is smallest so far; ties go by name and index, so that every
    party cuts alike. Raises ValueError if there are fewer tensors than fragments.
    """
    if not 1 <= num_fragments <= len(num_elements):
        raise ValueError(
            f"outer.num_fragments: {num_fragments} given; allowed: 1 to {len(num_elements)}, the number of tensors"
        )
    fragments: list[list[str]] = [[] for _ in range(num_fragments)]
    sizes = [0] * num_fragments
    for name in sorted(num_elements, key=lambda name: (-num_elements[name], name)):
        smallest = sizes.index(min(sizes))
        fragments[smallest].append(name)
        sizes[smallest] += num_elements[name]
    return [sorted(fragment) for fragment in fragments]
