"""From token statistics to figures with intervals: which records count, and what is computed of them.

Pure, without torch: may import `scoring`'s statistics, `results`, `canaries` and `functional`. Nothing
here is public.
"""

__all__: list[str] = []
