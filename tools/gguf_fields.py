"""Typed access to the metadata of a GGUF file: a missing or mistyped field is an error that names it."""

_REQUIRED = object()


class ConversionError(Exception):
    """The GGUF file cannot be converted; the message says which field or tensor and why."""


class Fields:
    """Metadata of a gguf.GGUFReader."""

    def __init__(self, reader):
        self._fields = reader.fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def _value(self, key, default, kinds, kind_name):
        field = self._fields.get(key)
        if field is None:
            if default is _REQUIRED:
                raise ConversionError(f"the GGUF file has no field {key}")
            return default
        value = field.contents()
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConversionError(f"field {key} is {value!r:.60}, not {kind_name}")
        return value

    def string(self, key: str, default=_REQUIRED):
        return self._value(key, default, (str,), "a string")

    def boolean(self, key: str, default=_REQUIRED):
        return self._value(key, default, (bool,), "true or false")

    def integer(self, key: str, default=_REQUIRED):
        return self._value(key, default, (int,), "an integer")

    def positive(self, key: str, default=_REQUIRED):
        value = self.integer(key, default)
        if value is not None and value <= 0:
            raise ConversionError(f"field {key} is {value}, not a positive integer")
        return value

    def real(self, key: str, default=_REQUIRED):
        value = self._value(key, default, (int, float), "a number")
        return value if value is None else float(value)

    def array(self, key: str, kind: type) -> list:
        values = self._value(key, _REQUIRED, (list,), "an array")
        for index, value in enumerate(values):
            if not isinstance(value, kind):
                raise ConversionError(f"field {key}[{index}] is {value!r:.60}, not of type {kind.__name__}")
        return values
