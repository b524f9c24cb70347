"""A teacher's answers in a folder, made once and used for every student: docs/teacher_cache_format.md.

`Writer` fills a folder, keyed by `Examples.ids`, and `TeacherCache` reads it, in any order and by any number of
processes. Only numpy is used here, so that other tools may read a cache with this part alone.
"""

from kdtune.teacher_cache.answers import Answers, Hidden, Samples, TopK, concatenate, take
from kdtune.teacher_cache.card import Card, Dataset, Teacher, teacher_fingerprint
from kdtune.teacher_cache.codec import estimate_bytes
from kdtune.teacher_cache.config import StoreConfig, check_store
from kdtune.teacher_cache.served import Question, ServedTeacher, ServerConfig, check_server
from kdtune.teacher_cache.store import (
    HEAD,
    TOKENIZER,
    TeacherCache,
    Writer,
    open_to_extend,
    read_card,
    write_head,
    write_tokenizer,
)

__all__ = [
    "HEAD",
    "TOKENIZER",
    "Answers",
    "Card",
    "Dataset",
    "Hidden",
    "Question",
    "Samples",
    "ServedTeacher",
    "ServerConfig",
    "StoreConfig",
    "Teacher",
    "TeacherCache",
    "TopK",
    "Writer",
    "check_server",
    "check_store",
    "concatenate",
    "estimate_bytes",
    "open_to_extend",
    "read_card",
    "take",
    "teacher_fingerprint",
    "write_head",
    "write_tokenizer",
]
