"""What a kubelet puts into the environment of every container beside a Service."""


def injected(service: str) -> dict[str, str]:
    """As a kubelet does, for one with a port called http and one that has no name."""
    variables = {f"{service}_SERVICE_HOST": "10.0.0.1", f"{service}_SERVICE_PORT": "9646"}
    variables[f"{service}_SERVICE_PORT_HTTP"] = "9646"
    variables[f"{service}_PORT"] = "tcp://10.0.0.1:9646"
    for port, protocol in ((9646, "tcp"), (53, "udp")):
        variables[f"{service}_PORT_{port}_{protocol.upper()}"] = f"{protocol}://10.0.0.1:{port}"
        variables[f"{service}_PORT_{port}_{protocol.upper()}_PROTO"] = protocol
        variables[f"{service}_PORT_{port}_{protocol.upper()}_PORT"] = str(port)
        variables[f"{service}_PORT_{port}_{protocol.upper()}_ADDR"] = "10.0.0.1"
    return variables
