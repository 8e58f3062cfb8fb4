"""What devices see. `agent-ctl mqtt cert NAME --out DIR`, then subscribe.py HOST PORT _viewer-NAME DIR."""

import sys

import paho.mqtt.client as mqtt

host, port, name, files = sys.argv[1:]
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
client.tls_set(f"{files}/server-ca.pem", f"{files}/certificate.pem", f"{files}/key.pem")
client.on_connect = lambda client, *_: client.subscribe("edgeward/v1/+/up/result")
client.on_message = lambda _, __, message: print(message.topic, message.payload.decode(), flush=True)
client.connect(host, int(port))
client.loop_forever()
