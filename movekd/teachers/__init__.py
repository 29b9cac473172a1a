"""Frozen encoders behind one protocol: a spec goes in, a ``Teacher`` comes out."""

from movekd.teachers.backbone import TeacherOutput
from movekd.teachers.teacher import Teacher, load_teacher

__all__ = ["Teacher", "TeacherOutput", "load_teacher"]
