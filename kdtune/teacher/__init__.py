"""Whatever answers "what would the teacher say here": a model, or what it has said before."""

from kdtune.teacher.asking import ask, keep_head
from kdtune.teacher.cached import CachedTeacher
from kdtune.teacher.config import TeacherConfig
from kdtune.teacher.hidden import add_hidden_loss, check_hidden_loss, compare_hidden, count_compared, run_student
from kdtune.teacher.live import LiveTeacher
from kdtune.teacher.start import (
    FoundTeacher,
    Teacher,
    check_live_teacher,
    check_teacher,
    find_teacher,
    load_live_teacher,
    load_teacher,
    teacher_folders,
)

__all__ = [
    "CachedTeacher",
    "FoundTeacher",
    "LiveTeacher",
    "Teacher",
    "TeacherConfig",
    "add_hidden_loss",
    "ask",
    "check_hidden_loss",
    "check_live_teacher",
    "check_teacher",
    "compare_hidden",
    "count_compared",
    "find_teacher",
    "keep_head",
    "load_live_teacher",
    "load_teacher",
    "run_student",
    "teacher_folders",
]
