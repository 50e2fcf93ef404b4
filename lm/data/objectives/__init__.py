"""Objectives as transforms of data: masking, span corruption, prefixes, pairs, documents of several parts."""
