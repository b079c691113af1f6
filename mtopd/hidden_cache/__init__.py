"""The hidden cache: teachers' last hidden states on the student's tokens, on disk as zarr v3.

Commit protocol.  A writer appends the rows of one teacher to a segment, a zarr array of its own.
``commit`` makes the shard files durable, then the segment's zarr.json, and only then an index file
that names every sample in it: each file is fsynced under a partial name, renamed, and its folder
fsynced.  The index file is the commit record.  A sample exists if and only if a sound index file
names it, so a writer killed at any instant leaves orphans but never a wrong row; ``recover`` saves
what their journals name and the disk holds whole. Nothing is changed after its commit: a damaged
sample is computed again into a new segment, and readers use the copy that is sound.
``merge_index`` joins index files; the joined one is published before the old ones go.
"""

from mtopd.hidden_cache.folder import committed, remove
from mtopd.hidden_cache.key import RowKey, sample_key
from mtopd.hidden_cache.reader import CacheEntry, CacheMiss, HiddenCacheReader, Read
from mtopd.hidden_cache.recovery import Recovery, collect_garbage, merge_index, recover
from mtopd.hidden_cache.rows import view_rows
from mtopd.hidden_cache.segment import SegmentDamaged
from mtopd.hidden_cache.shared_read import CachedStates, StateFormat
from mtopd.hidden_cache.writer import HiddenCacheWriter

__all__ = [
    "CacheEntry",
    "CacheMiss",
    "CachedStates",
    "HiddenCacheReader",
    "HiddenCacheWriter",
    "Read",
    "Recovery",
    "RowKey",
    "SegmentDamaged",
    "StateFormat",
    "collect_garbage",
    "committed",
    "merge_index",
    "recover",
    "remove",
    "sample_key",
    "view_rows",
]
