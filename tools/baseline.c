/* Sending and working by a C client (librabbitmq), to see how much Python and pika cost. bench.py compiles it.
   AMQP_URL=... ./baseline publish < tasks    send each line, up to 2 * BATCH of them without a confirm
   AMQP_URL=... ./baseline work               do tasks until killed: prefetch 1, acknowledged one by one */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 1000 };
static amqp_connection_state_t conn;
static amqp_bytes_t queue = {10, "task_queue"};

/* Each confirm is for one task or for all up to that one. Those of a single queue come in order. */
static void wait_for_confirms(uint64_t last) {
  static uint64_t confirmed = 0;
  while (confirmed < last) {
    amqp_method_t method;
    amqp_maybe_release_buffers(conn);
    if (amqp_simple_wait_method(conn, 1, AMQP_BASIC_ACK_METHOD, &method)) errx(1, "no confirm");
    amqp_basic_ack_t *ack = method.decoded;
    if (!ack->multiple && ack->delivery_tag != confirmed + 1) errx(1, "confirms are not in order");
    confirmed = ack->delivery_tag;
  }
}

static void publish(void) {
  char line[1024];
  amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG, .delivery_mode = 2};
  uint64_t sent = 0;
  amqp_confirm_select(conn, 1);
  while (fgets(line, sizeof line, stdin)) {
    amqp_bytes_t task = {strcspn(line, "\n"), line};
    if (amqp_basic_publish(conn, 1, amqp_empty_bytes, queue, 1, 0, &properties, task)) errx(1, "basic.publish");
    if (++sent % BATCH == 0) wait_for_confirms(sent - BATCH);
  }
  wait_for_confirms(sent);
}

static void work(void) {
  amqp_envelope_t task;
  amqp_basic_qos(conn, 1, 0, 1, 0);
  amqp_basic_consume(conn, 1, queue, amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
  setvbuf(stdout, NULL, _IOLBF, 0); /* line by line, as the others */
  while (amqp_consume_message(conn, &task, NULL, 0).reply_type == AMQP_RESPONSE_NORMAL) {
    printf(" [x] Received '%.*s'\n [x] Done\n", (int)task.message.body.len, (char *)task.message.body.bytes);
    amqp_basic_ack(conn, 1, task.delivery_tag, 0);
    amqp_destroy_envelope(&task);
    amqp_maybe_release_buffers(conn);
  }
}

int main(int argc, char **argv) {
  struct amqp_connection_info to;
  conn = amqp_new_connection();
  if (argc != 2 || amqp_parse_url(getenv("AMQP_URL"), &to)) errx(2, "see the top of baseline.c");
  if (amqp_socket_open(amqp_tcp_socket_new(conn), to.host, to.port)) errx(1, "connect");
  amqp_login(conn, to.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, to.user, to.password);
  if (!amqp_channel_open(conn, 1)) errx(1, "login");
  strcmp(argv[1], "publish") ? work() : publish();
  amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
}
