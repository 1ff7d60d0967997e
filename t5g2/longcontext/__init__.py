"""Tests of long context after RULER and MRCR: problems of any length, their scores and curves."""
