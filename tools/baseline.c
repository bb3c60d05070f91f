/* The same two jobs done by a C client (librabbitmq), to see how much Python and pika cost.

       AMQP_URL=... ./baseline publish < tasks    publish each line, up to WINDOW of them without a confirm
       AMQP_URL=... ./baseline work               do tasks until killed: prefetch 1, acknowledged one by one

   Like the minimal loops in Python it is no program to use: whatever goes wrong ends it. */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 2000, RING = 65536 }; /* RING: more than WINDOW, so that no two tasks under way share a place */

static amqp_connection_state_t conn;
static amqp_bytes_t queue = {10, "task_queue"};

static void require(int holds, const char *what) {
  if (!holds) {
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
  }
}

/* Read one basic.ack; return how many tasks it confirms. They come out of order, for one task or for all up to one. */
static int read_confirm(void) {
  static char confirmed[RING];
  static uint64_t seen = 0; /* all up to this tag are confirmed */
  amqp_frame_t frame;
  int count = 0;
  amqp_maybe_release_buffers(conn);
  require(amqp_simple_wait_frame(conn, &frame) == AMQP_STATUS_OK, "read");
  require(frame.frame_type == AMQP_FRAME_METHOD && frame.payload.method.id == AMQP_BASIC_ACK_METHOD, "basic.ack");
  amqp_basic_ack_t *ack = frame.payload.method.decoded;
  for (uint64_t tag = ack->multiple ? seen + 1 : ack->delivery_tag; tag <= ack->delivery_tag; tag++) {
    count += !confirmed[tag % RING];
    confirmed[tag % RING] = 1;
  }
  while (confirmed[(seen + 1) % RING]) confirmed[++seen % RING] = 0;
  return count;
}

static void publish(void) {
  static char line[131072];
  amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG, .delivery_mode = 2};
  int unconfirmed = 0;
  require(amqp_confirm_select(conn, 1) != NULL, "confirm.select");
  while (fgets(line, sizeof line, stdin)) {
    amqp_bytes_t task = {strcspn(line, "\n"), line};
    require(!amqp_basic_publish(conn, 1, amqp_empty_bytes, queue, 1, 0, &properties, task), "basic.publish");
    if (++unconfirmed == WINDOW) while (unconfirmed > WINDOW / 2) unconfirmed -= read_confirm();
  }
  while (unconfirmed) unconfirmed -= read_confirm();
}

static void work(void) {
  amqp_envelope_t task;
  require(amqp_basic_qos(conn, 1, 0, 1, 0) != NULL, "basic.qos");
  require(amqp_basic_consume(conn, 1, queue, amqp_empty_bytes, 0, 0, 0, amqp_empty_table) != NULL, "basic.consume");
  setvbuf(stdout, NULL, _IOLBF, 0); /* as the others: line by line */
  for (;;) {
    amqp_maybe_release_buffers(conn);
    require(amqp_consume_message(conn, &task, NULL, 0).reply_type == AMQP_RESPONSE_NORMAL, "delivery");
    printf(" [x] Received '%.*s'\n [x] Done\n", (int)task.message.body.len, (char *)task.message.body.bytes);
    require(!amqp_basic_ack(conn, 1, task.delivery_tag, 0), "basic.ack");
    amqp_destroy_envelope(&task);
  }
}

int main(int argc, char **argv) {
  struct amqp_connection_info to;
  conn = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(conn);
  require(argc == 2 && amqp_parse_url(getenv("AMQP_URL"), &to) == AMQP_STATUS_OK, "AMQP_URL");
  require(amqp_socket_open(socket, to.host, to.port) == AMQP_STATUS_OK, "connect");
  amqp_rpc_reply_t reply = amqp_login(conn, to.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, to.user, to.password);
  require(reply.reply_type == AMQP_RESPONSE_NORMAL && amqp_channel_open(conn, 1) != NULL, "login");
  if (!strcmp(argv[1], "publish")) publish(); else work();
  amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
  return 0;
}
