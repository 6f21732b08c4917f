"""The broker: hands work from stage to stage. `service` decides, `server` moves frames."""
