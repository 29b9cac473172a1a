"""Frozen encoders behind one protocol: a spec goes in, a ``Teacher`` comes out."""

from movekd.teachers.load import Teacher, load_teacher
from movekd.teachers.trunk import TeacherOutput

__all__ = ["Teacher", "TeacherOutput", "load_teacher"]
