"""Refusals: what is to be done about each code that librdkafka and the broker know, one line each.

A code that is not here, or that has no business in a producer (UNEXPECTED), may be about the event or about us, for now
or for good. So it is tried again a few times, the event alone, and then taken for the event's own: whatever it is, it
neither loops nor sends anything twice.
Source: librdkafka's rdkafka.h (rd_kafka_resp_err_t); Kafka's org.apache.kafka.common.protocol.Errors.
"""

from enum import Enum
from typing import Final

from confluent_kafka import KafkaError

from cdc_outbox.errors import BatchRefused, BrokerUnavailable, CdcOutboxError, PoisonEvent, TopicRefused


class Verdict(Enum):
    POISON = "the event can never be published"
    OPERATOR = "nothing can be published until somebody changes something"
    PASSING = "the same event can be tried again"
    START_AGAIN = "another producer can, from the slot on"
    UNEXPECTED = "tried again a few times, then as POISON"


_POISON, _OPERATOR, _PASSING = Verdict.POISON, Verdict.OPERATOR, Verdict.PASSING
_START_AGAIN, _UNEXPECTED = Verdict.START_AGAIN, Verdict.UNEXPECTED

#: By name, as confluent_kafka.KafkaError has it.
_VERDICTS: Final = {
    # what the broker says of a record, or of the batch that it came in
    "INVALID_MSG": _POISON,
    "MSG_SIZE_TOO_LARGE": _POISON,
    "TOPIC_EXCEPTION": _POISON,  # a name that no topic can have, or too near to another's
    "RECORD_LIST_TOO_LARGE": _POISON,
    "INVALID_TIMESTAMP": _POISON,  # message.timestamp.before.max.ms, .after.max.ms
    "POLICY_VIOLATION": _POISON,
    "INVALID_RECORD": _POISON,
    # rights, credentials, and what somebody has to set otherwise
    "UNKNOWN_TOPIC_OR_PART": _OPERATOR,  # it was there before the first event went to it
    "_UNKNOWN_TOPIC": _OPERATOR,
    "TOPIC_AUTHORIZATION_FAILED": _OPERATOR,
    "CLUSTER_AUTHORIZATION_FAILED": _OPERATOR,
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": _OPERATOR,
    "SASL_AUTHENTICATION_FAILED": _OPERATOR,
    "UNSUPPORTED_SASL_MECHANISM": _OPERATOR,
    "ILLEGAL_SASL_STATE": _OPERATOR,
    "SECURITY_DISABLED": _OPERATOR,
    "DELEGATION_TOKEN_AUTH_DISABLED": _OPERATOR,
    "DELEGATION_TOKEN_NOT_FOUND": _OPERATOR,
    "DELEGATION_TOKEN_OWNER_MISMATCH": _OPERATOR,
    "DELEGATION_TOKEN_REQUEST_NOT_ALLOWED": _OPERATOR,
    "DELEGATION_TOKEN_AUTHORIZATION_FAILED": _OPERATOR,
    "DELEGATION_TOKEN_EXPIRED": _OPERATOR,
    "UNACCEPTABLE_CREDENTIAL": _OPERATOR,
    "PRINCIPAL_DESERIALIZATION_FAILURE": _OPERATOR,
    "INVALID_PRINCIPAL_TYPE": _OPERATOR,
    "_AUTHENTICATION": _OPERATOR,
    "_SSL": _OPERATOR,
    "INVALID_REQUIRED_ACKS": _OPERATOR,
    "INVALID_CONFIG": _OPERATOR,
    "INVALID_PARTITIONS": _OPERATOR,
    "INVALID_REPLICATION_FACTOR": _OPERATOR,
    "INVALID_REPLICA_ASSIGNMENT": _OPERATOR,
    "UNSUPPORTED_VERSION": _OPERATOR,
    "UNSUPPORTED_FOR_MESSAGE_FORMAT": _OPERATOR,
    "UNSUPPORTED_COMPRESSION_TYPE": _OPERATOR,
    "MISMATCHED_ENDPOINT_TYPE": _OPERATOR,
    "UNSUPPORTED_ENDPOINT_TYPE": _OPERATOR,
    "_UNSUPPORTED_FEATURE": _OPERATOR,
    "_NOT_CONFIGURED": _OPERATOR,
    "_BAD_COMPRESSION": _OPERATOR,
    # leaders move, replicas are away, brokers are busy
    "LEADER_NOT_AVAILABLE": _PASSING,
    "NOT_LEADER_FOR_PARTITION": _PASSING,
    "REQUEST_TIMED_OUT": _PASSING,
    "BROKER_NOT_AVAILABLE": _PASSING,
    "REPLICA_NOT_AVAILABLE": _PASSING,
    "STALE_CTRL_EPOCH": _PASSING,
    "NETWORK_EXCEPTION": _PASSING,
    "COORDINATOR_LOAD_IN_PROGRESS": _PASSING,
    "COORDINATOR_NOT_AVAILABLE": _PASSING,
    "NOT_COORDINATOR": _PASSING,
    "NOT_ENOUGH_REPLICAS": _PASSING,
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": _PASSING,
    "NOT_CONTROLLER": _PASSING,
    "OPERATION_NOT_ATTEMPTED": _PASSING,
    "KAFKA_STORAGE_ERROR": _PASSING,
    "LOG_DIR_NOT_FOUND": _PASSING,
    "REASSIGNMENT_IN_PROGRESS": _PASSING,
    "LISTENER_NOT_FOUND": _PASSING,
    "FENCED_LEADER_EPOCH": _PASSING,
    "UNKNOWN_LEADER_EPOCH": _PASSING,
    "STALE_BROKER_EPOCH": _PASSING,
    "OFFSET_NOT_AVAILABLE": _PASSING,
    "PREFERRED_LEADER_NOT_AVAILABLE": _PASSING,
    "ELIGIBLE_LEADERS_NOT_AVAILABLE": _PASSING,
    "THROTTLING_QUOTA_EXCEEDED": _PASSING,
    "CONCURRENT_TRANSACTIONS": _PASSING,
    "UNKNOWN_CONTROLLER_ID": _PASSING,
    "REBOOTSTRAP_REQUIRED": _PASSING,
    "_TRANSPORT": _PASSING,
    "_ALL_BROKERS_DOWN": _PASSING,
    "_RESOLVE": _PASSING,
    "_TIMED_OUT": _PASSING,
    "_TIMED_OUT_QUEUE": _PASSING,
    "_QUEUE_FULL": _PASSING,
    "_ISR_INSUFF": _PASSING,
    "_NODE_UPDATE": _PASSING,
    "_WAIT_COORD": _PASSING,
    "_WAIT_CACHE": _PASSING,
    "_IN_PROGRESS": _PASSING,
    "_PREV_IN_PROGRESS": _PASSING,
    "_RETRY": _PASSING,
    "_INTR": _PASSING,
    "_PARTIAL": _PASSING,
    "_UNDERFLOW": _PASSING,
    "_BAD_MSG": _PASSING,  # an answer that came garbled
    "_FAIL": _PASSING,
    "_CRIT_SYS_RESOURCE": _PASSING,
    "_UNKNOWN_BROKER": _PASSING,
    "_DESTROY_BROKER": _PASSING,
    "_UNKNOWN_PROTOCOL": _PASSING,
    # this producer can go no further
    "OUT_OF_ORDER_SEQUENCE_NUMBER": _START_AGAIN,
    "DUPLICATE_SEQUENCE_NUMBER": _START_AGAIN,
    "INVALID_PRODUCER_EPOCH": _START_AGAIN,
    "INVALID_PRODUCER_ID_MAPPING": _START_AGAIN,
    "UNKNOWN_PRODUCER_ID": _START_AGAIN,
    "PRODUCER_FENCED": _START_AGAIN,
    "INVALID_TXN_STATE": _START_AGAIN,
    "TRANSACTION_COORDINATOR_FENCED": _START_AGAIN,
    "TRANSACTION_ABORTABLE": _START_AGAIN,
    "UNKNOWN_TOPIC_ID": _START_AGAIN,  # the topic was created again
    "INCONSISTENT_TOPIC_ID": _START_AGAIN,
    "_UNKNOWN_PARTITION": _START_AGAIN,  # created again, with fewer partitions
    "_MSG_TIMED_OUT": _START_AGAIN,
    "_PURGE_QUEUE": _START_AGAIN,
    "_PURGE_INFLIGHT": _START_AGAIN,
    "_FATAL": _START_AGAIN,
    "_GAPLESS_GUARANTEE": _START_AGAIN,
    "_FENCED": _START_AGAIN,
    "_INCONSISTENT": _START_AGAIN,
    "_STATE": _START_AGAIN,
    "_OUTDATED": _START_AGAIN,
    "_DESTROY": _START_AGAIN,
    # consumers', administrators', other libraries'; and those that say nothing
    "UNKNOWN": _UNEXPECTED,  # "an unexpected server error": what an interceptor or a proxy raises
    "NO_ERROR": _UNEXPECTED,
    "OFFSET_OUT_OF_RANGE": _UNEXPECTED,
    "INVALID_MSG_SIZE": _UNEXPECTED,
    "OFFSET_METADATA_TOO_LARGE": _UNEXPECTED,
    "ILLEGAL_GENERATION": _UNEXPECTED,
    "INCONSISTENT_GROUP_PROTOCOL": _UNEXPECTED,
    "INVALID_GROUP_ID": _UNEXPECTED,
    "UNKNOWN_MEMBER_ID": _UNEXPECTED,
    "INVALID_SESSION_TIMEOUT": _UNEXPECTED,
    "REBALANCE_IN_PROGRESS": _UNEXPECTED,
    "INVALID_COMMIT_OFFSET_SIZE": _UNEXPECTED,
    "GROUP_AUTHORIZATION_FAILED": _UNEXPECTED,
    "TOPIC_ALREADY_EXISTS": _UNEXPECTED,
    "INVALID_REQUEST": _UNEXPECTED,
    "INVALID_TRANSACTION_TIMEOUT": _UNEXPECTED,
    "NON_EMPTY_GROUP": _UNEXPECTED,
    "GROUP_ID_NOT_FOUND": _UNEXPECTED,
    "FETCH_SESSION_ID_NOT_FOUND": _UNEXPECTED,
    "INVALID_FETCH_SESSION_EPOCH": _UNEXPECTED,
    "TOPIC_DELETION_DISABLED": _UNEXPECTED,
    "MEMBER_ID_REQUIRED": _UNEXPECTED,
    "GROUP_MAX_SIZE_REACHED": _UNEXPECTED,
    "FENCED_INSTANCE_ID": _UNEXPECTED,
    "ELECTION_NOT_NEEDED": _UNEXPECTED,
    "NO_REASSIGNMENT_IN_PROGRESS": _UNEXPECTED,
    "GROUP_SUBSCRIBED_TO_TOPIC": _UNEXPECTED,
    "UNSTABLE_OFFSET_COMMIT": _UNEXPECTED,
    "RESOURCE_NOT_FOUND": _UNEXPECTED,
    "DUPLICATE_RESOURCE": _UNEXPECTED,
    "INCONSISTENT_VOTER_SET": _UNEXPECTED,
    "INVALID_UPDATE_VERSION": _UNEXPECTED,
    "FEATURE_UPDATE_FAILED": _UNEXPECTED,
    "FENCED_MEMBER_EPOCH": _UNEXPECTED,
    "UNRELEASED_INSTANCE_ID": _UNEXPECTED,
    "UNSUPPORTED_ASSIGNOR": _UNEXPECTED,
    "STALE_MEMBER_EPOCH": _UNEXPECTED,
    "UNKNOWN_SUBSCRIPTION_ID": _UNEXPECTED,
    "TELEMETRY_TOO_LARGE": _UNEXPECTED,
    "INVALID_REGISTRATION": _UNEXPECTED,
    "INVALID_RECORD_STATE": _UNEXPECTED,
    "SHARE_SESSION_NOT_FOUND": _UNEXPECTED,
    "INVALID_SHARE_SESSION_EPOCH": _UNEXPECTED,
    "FENCED_STATE_EPOCH": _UNEXPECTED,
    "INVALID_VOTER_KEY": _UNEXPECTED,
    "DUPLICATE_VOTER": _UNEXPECTED,
    "VOTER_NOT_FOUND": _UNEXPECTED,
    "INVALID_REGULAR_EXPRESSION": _UNEXPECTED,
    "STREAMS_INVALID_TOPOLOGY": _UNEXPECTED,
    "STREAMS_INVALID_TOPOLOGY_EPOCH": _UNEXPECTED,
    "STREAMS_TOPOLOGY_FENCED": _UNEXPECTED,
    "SHARE_SESSION_LIMIT_REACHED": _UNEXPECTED,
    "_INVALID_DIFFERENT_RECORD": _UNEXPECTED,
    "_LOG_TRUNCATION": _UNEXPECTED,
    "_AUTO_OFFSET_RESET": _UNEXPECTED,
    "_NOOP": _UNEXPECTED,
    "_ASSIGNMENT_LOST": _UNEXPECTED,
    "_APPLICATION": _UNEXPECTED,
    "_MAX_POLL_EXCEEDED": _UNEXPECTED,
    "_INVALID_TYPE": _UNEXPECTED,
    "_INVALID_ARG": _UNEXPECTED,
    "_NOENT": _UNEXPECTED,
    "_READ_ONLY": _UNEXPECTED,
    "_VALUE_DESERIALIZATION": _UNEXPECTED,
    "_KEY_DESERIALIZATION": _UNEXPECTED,
    "_VALUE_SERIALIZATION": _UNEXPECTED,
    "_KEY_SERIALIZATION": _UNEXPECTED,
    "_NO_OFFSET": _UNEXPECTED,
    "_NOT_IMPLEMENTED": _UNEXPECTED,
    "_CONFLICT": _UNEXPECTED,
    "_REVOKE_PARTITIONS": _UNEXPECTED,
    "_ASSIGN_PARTITIONS": _UNEXPECTED,
    "_EXISTING_SUBSCRIPTION": _UNEXPECTED,
    "_UNKNOWN_GROUP": _UNEXPECTED,
    "_FS": _UNEXPECTED,
    "_PARTITION_EOF": _UNEXPECTED,
}

#: An older librdkafka does not know all of them.
_BY_CODE: Final = {
    getattr(KafkaError, name): verdict for name, verdict in _VERDICTS.items() if hasattr(KafkaError, name)
}

#: Of a topic: it is not there; it must not be seen, or not be written to.
MISSING: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})  # noqa: SLF001
FORBIDDEN: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})

#: What librdkafka puts into the text of a failed login when it could not be tried: the broker went away meanwhile, or
#: (OAUTHBEARER) the token could not be fetched, and the one that it has may be good for another while.
_NOT_ANSWERED: Final = (
    "Failed to acquire SASL OAUTHBEARER token",
    "transport failure",
    "timed out",
    "Disconnected",
    "Connection reset",
    "Broken pipe",
    "Connection refused",
)
_LOGIN: Final = frozenset(
    {
        *FORBIDDEN,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError._AUTHENTICATION,  # noqa: SLF001 - librdkafka's own codes are spelt so
        KafkaError._SSL,  # noqa: SLF001
    }
)
MISSING_TOPIC_HINT: Final = "cdc-outbox topics create makes it, or kafka.create_topics = true"
#: What is to be done about a refusal, where its name does not say it.
_POISON_HINTS: Final = {
    KafkaError.INVALID_TIMESTAMP: "its commit time is outside of what the topic takes: raise "
    "message.timestamp.before.max.ms or .after.max.ms, or set the database server's clock right",
    KafkaError.TOPIC_EXCEPTION: "correct what writes the row: no topic can have that name beside the others",
}
_POISON_HINT: Final = (
    "raise the limit (the topic's max.message.bytes, kafka.producer.message.max.bytes), or correct what writes the row"
)


def verdict_on(error: KafkaError) -> Verdict:
    """Of a refused or failed event."""
    return _BY_CODE.get(error.code(), Verdict.UNEXPECTED)


def denies_us(error: KafkaError) -> bool:
    """Of what librdkafka complains of outside any event: whether the broker has refused our credentials."""
    return error.code() in _LOGIN and not any(words in error.str() for words in _NOT_ANSWERED)


def explain(error: KafkaError, topic: str, *, alone: bool) -> CdcOutboxError:
    """What is to be done about a refused event; ``alone`` if nothing was sent with it."""
    code, reason, verdict = error.code(), f"{error.name()}: {error.str()}", verdict_on(error)
    if verdict is Verdict.OPERATOR:
        return _explain_to_operator(code, reason, topic)
    if verdict is Verdict.POISON or (alone and verdict is Verdict.UNEXPECTED):
        hint = _POISON_HINTS.get(code, _POISON_HINT)
        return PoisonEvent(f"topic {topic} refuses it: {reason}", reason=error.name(), hint=hint)
    if alone or verdict is Verdict.PASSING:
        return BrokerUnavailable(f"publishing to topic {topic} failed: {reason}")
    return BatchRefused(f"topic {topic} or another does not take an event, or one sent with it: {reason}")


def _explain_to_operator(code: int, reason: str, topic: str) -> TopicRefused:
    if code in MISSING:
        return TopicRefused(f"topic {topic} does not exist (any more): {reason}", topic=topic, hint=MISSING_TOPIC_HINT)
    if code in FORBIDDEN:
        return TopicRefused(
            f"topic {topic} must not be written to: {reason}",
            topic=topic,
            hint="grant WRITE on the topic, and DESCRIBE (before Kafka 2.8 IDEMPOTENT_WRITE on the cluster, too)",
        )
    return TopicRefused(
        f"topic {topic} cannot be written to: {reason}", topic=topic, hint="check kafka.producer, topic and broker"
    )
